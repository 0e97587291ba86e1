"""What every rank does in every step, as text."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir import Pattern, Plan, Segment, lower
from .strip import letters, representative_steps, strip

__all__ = ["TIMELINE_LEGEND", "timeline"]

TIMELINE_LEGEND = (
    "u, c: unconditional, conditional branch of the whole denoiser   b: both batched   0-9: that stage alone   "
    "+: several launches   space: idle"
)

_MARGIN = 13
"""Columns beside the steps."""
_MOST = 100
"""Steps of one line."""


def timeline(plan: Plan, *, width: int = _MOST + _MARGIN) -> str:
    """One line per rank, one character per step, in blocks that `width` columns hold; patterns by letter on top."""
    steps = [plan.pattern(name) for name in representative_steps(plan.schedule)]
    alphabet = letters(pattern.name for pattern in plan.patterns)
    lines, at_once = [], min(_MOST, max(10, width - _MARGIN))
    for start in range(0, len(steps), at_once):
        chunk = steps[start : start + at_once]
        lines.append(f"{'step ' + str(start):>10} │{strip([p.name for p in chunk], alphabet)}│")
        lines += [f"{'rank ' + str(rank):>10} │{_rank_line(chunk, rank)}│" for rank in range(plan.world_size)]
    return "\n".join(lines)


def _rank_line(steps: Sequence[Pattern], rank: int) -> str:
    return "".join(_mark(pattern, [s for s in lower(pattern) if s.rank == rank]) for pattern in steps)


def _mark(pattern: Pattern, segments: Sequence[Segment]) -> str:
    if not segments:
        return " "
    if len(segments) > 1:
        return "+"
    (segment,) = segments
    if len(segment.stages) == pattern.stages:
        return "b" if len(segment.branches) == 2 else segment.branches[0][0]
    return str(segment.stages[0]) if len(segment.stages) == 1 and segment.stages[0] < 10 else "+"
