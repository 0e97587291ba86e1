"""Error curves by pattern, step and age, from the sketches of several batches of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ir import ErrorCurve, PatternErrors
from .record import Option
from .sensitivity import Sketches, image_error

__all__ = ["error_curves"]


def error_curves(
    batches: Sequence[Sketches], options: Sequence[Option], ages: Sequence[int], num_steps: int
) -> tuple[PatternErrors, ...]:
    """The curves of every pattern, with a column for every age from 1 to the largest measured.

    Ages between measured ones are interpolated linearly (error grows about linearly with age). Steps too early for an
    age to occur take the error of the oldest age that can, scaled by the ratio of ages; no schedule can use them.
    """
    patterns: dict[str, dict[str, list[Option]]] = {}
    for option in options:
        patterns.setdefault(option.pattern, {}).setdefault(option.source, []).append(option)
    results = []
    for pattern, sources in patterns.items():
        curves = []
        for source, members in sources.items():
            rows = [_row(batches, members, step, ages, source == "none") for step in range(num_steps)]
            curves.append(ErrorCurve(source=members[0].source, rmse=_fill_first_rows(rows)))
        results.append(PatternErrors(pattern=pattern, curves=tuple(curves)))
    return tuple(results)


def _row(
    batches: Sequence[Sketches], members: Sequence[Option], step: int, ages: Sequence[int], ageless: bool
) -> tuple[float, ...] | None:
    known = {
        option.age: image_error([batch.steps[step][option] for batch in batches], batches[0].pixels)
        for option in members if option in batches[0].steps[step]
    }
    if not known:
        return None
    if ageless:
        return (known[1],)
    oldest = max(known)
    row = np.interp(range(1, max(ages) + 1), list(known), list(known.values()))
    return tuple(float(f"{value * max(1.0, age / oldest):.6g}") for age, value in enumerate(row, start=1))


def _fill_first_rows(rows: Sequence[tuple[float, ...] | None]) -> tuple[tuple[float, ...], ...]:
    """Rows of steps at which nothing old exists yet (step 0) repeat the first measured row; none can be used there."""
    first = next(row for row in rows if row is not None)
    return tuple(row if row is not None else first for row in rows)
