"""Curves as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["text_plot"]

_MARGIN, _MOST = 11, 100


def text_plot(values: Sequence[float], *, height: int = 10, width: int = 111, label: str = "step") -> str:
    """A dot per column over a vertical axis from zero (or the least value, if negative) to the largest.

    Curves longer than `width` columns hold beside the axis (at most 100) are averaged over runs of steps.
    """
    if not values:
        return "(no values)"
    run = math.ceil(len(values) / min(_MOST, max(10, width - _MARGIN)))
    columns = [sum(chunk) / len(chunk) for chunk in (values[i : i + run] for i in range(0, len(values), run))]
    top, bottom = max(columns), min(0.0, *columns)
    span = (top - bottom) or 1.0
    rows = [round((value - bottom) / span * (height - 1)) for value in columns]
    lines = []
    for level in reversed(range(height)):
        scale = bottom + span * level / (height - 1) if height > 1 else top
        marks = "".join("•" if row == level else " " for row in rows)
        lines.append(f"{scale:>9.4g} ┤{marks}".rstrip())
    ruler = "".join("┴" if index % 10 == 0 else "─" for index in range(len(columns)))
    ticks = "".join(f"{index * run:<10}" for index in range(0, len(columns), 10)).rstrip()
    return "\n".join([*lines, f"{'':>9} └{ruler}", f"{label:>9}  {ticks}"])
