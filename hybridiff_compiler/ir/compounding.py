"""How the errors of single steps add up to the error of a whole schedule."""

from __future__ import annotations

import math
from itertools import pairwise

from pydantic import Field, field_validator

from .data import Data

__all__ = ["Compounding", "ScheduleCheck"]

_ONE_SIDED_95 = 1.645
"""Standard errors of a normal distribution below which it falls with a probability of 5 %."""


class ScheduleCheck(Data):
    """A schedule measured whole, and what a fit to other schedules on other prompts had predicted for it."""

    kind: str
    """`solved`: from the planner's frontier; `random`: drawn."""
    raw_db: float
    """`-20 log10` of its summed error."""
    predicted_db: float
    """Mean PSNR predicted by a fit that saw neither this schedule nor its prompts."""
    measured_db: float
    """Mean PSNR over its prompts."""
    std_db: float = Field(ge=0)
    """Standard deviation of the PSNR over its prompts."""
    prompts: int = Field(ge=1)


class Compounding(Data):
    """How summed single-step errors turn into the PSNR of a whole schedule, as measured on schedules.

    Errors add up almost coherently, so the PSNR follows `-20 log10(sum of rmse)` (the *raw* value) with an offset that
    changes slowly: a monotone curve through measured points, straight between them, of slope one beyond them.
    """

    knots: tuple[tuple[float, float], ...] = ()
    """(raw dB, mean PSNR in dB), both strictly increasing; empty: the PSNR is the raw value."""
    residual_db: float = Field(default=0.0, ge=0)
    """Root mean square of the distances of solved schedules from the curve, each left out of its own fit."""
    prompt_std_db: float = Field(default=0.0, ge=0)
    """Standard deviation of the PSNR over prompts, mean over the measured schedules."""
    prompts: int = Field(default=0, ge=0)
    """Number of prompts that schedules were measured on, each on one block of them."""
    schedules: int = Field(default=0, ge=0)
    """Number of schedules measured for the fit."""
    checks: tuple[ScheduleCheck, ...] = ()
    """Cross-validation on unseen schedules and unseen prompts; empty when there were too few of them."""

    def mean_error_db(self, kind: str | None = None) -> float | None:
        """Mean absolute difference between prediction and measurement in the cross-validation (of one kind of
        schedules): the error bar of a predicted mean over `checks[..].prompts` unseen prompts. None without checks."""
        misses = [abs(c.measured_db - c.predicted_db) for c in self.checks if kind in (None, c.kind)]
        return sum(misses) / len(misses) if misses else None

    @property
    def bias_db(self) -> float | None:
        """Mean of measurement less prediction in the cross-validation; None without checks."""
        misses = [check.measured_db - check.predicted_db for check in self.checks]
        return sum(misses) / len(misses) if misses else None

    @field_validator("knots")
    @classmethod
    def _increasing(cls, knots: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        if any(b[0] <= a[0] or b[1] <= a[1] for a, b in pairwise(knots)):
            raise ValueError(f"knots must increase in both coordinates, got {knots}")
        return knots

    def psnr_db(self, error: float) -> float:
        """Predicted mean PSNR of a schedule whose step errors sum to `error`; infinite for 0."""
        if error <= 0:
            return math.inf
        raw = -20 * math.log10(error)
        if not self.knots:
            return raw
        (first, first_db), (last, last_db) = self.knots[0], self.knots[-1]
        if raw <= first:
            return first_db + (raw - first)
        for (left, left_db), (right, right_db) in pairwise(self.knots):
            if raw <= right:
                return left_db + (raw - left) * (right_db - left_db) / (right - left)
        return last_db + (raw - last)

    @property
    def reserve_db(self) -> float:
        """What the planner keeps in reserve for the mean over equally many other prompts: the one-sided 95 % bound of
        the difference between prediction and measurement, from the curve's residuals and two samples of prompts."""
        sampling = self.prompt_std_db * math.sqrt(2 / self.prompts) if self.prompts else 0.0
        return _ONE_SIDED_95 * math.hypot(self.residual_db, sampling)
