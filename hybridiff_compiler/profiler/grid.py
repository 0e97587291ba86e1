"""Which ages are measured at which steps.

Errors change smoothly with step and age, except in the first and the last few steps of a generation. Measuring those
steps, every third one between them and three ages takes a fifth of the work of measuring everything; what lies between
is interpolated (`curves.py`), on a logarithmic scale. Both bundled models: 0.2 dB mean distance from a full
measurement (`tools/check_grid.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "GAPS", "LONGEST_TREND", "QUICK", "THINNED", "Grid"]

GAPS = (1, 2, 4, 8)
"""Steps between the two that a trend is drawn through: errors are measured at these, and a gap between two of them
counts as the larger one (a longer line errs more)."""
LONGEST_TREND = 3
"""Largest age at which trends are measured, and so used; nor are they above the gap, as no line is drawn further than
its two points lie apart. What was measured on exact generations holds less and less
beyond: a line magnifies what earlier cheap steps have done to its two points. On the bundled MMDiT schedules with
trends of up to 8 steps, or beyond the gap, fell 8 to 12 dB short of their predictions at 8 times the speed."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A selection of (step, age) pairs."""

    ages: tuple[int, ...]
    """Ages measured, rising, the first one 1."""
    stride: int = 1
    """Every so many steps."""
    edge: int = 3
    """So many steps at either end are measured whatever the stride."""

    def ages_at(self, step: int, num_steps: int, gap: int = 0) -> tuple[int, ...]:
        """The ages to measure at `step`, with `gap` none above it; the first step at which an age can occur always has
        it."""
        on_grid = step <= self.edge or step >= num_steps - self.edge or (step - 1) % self.stride == 0
        return tuple(age for age in self.ages if age + gap == step or (on_grid and age + gap < step))


FULL = Grid(ages=(1, 2, 3, 5, 8))
"""Every step."""
THINNED = Grid(ages=(1, 3, 8), stride=3)
"""A fifth of the work of `FULL`."""
QUICK = Grid(ages=(1, 3, 8), stride=6, edge=2)
"""A rough picture."""
