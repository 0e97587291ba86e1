"""Image errors of single steps that run by a pattern, by step and age, and how finely they were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from .data import Data

__all__ = ["ErrorCurve", "ErrorSampling", "PatternErrors", "Source", "at_gap"]

Source = Literal["activations", "memory", "none"]


class ErrorCurve(Data):
    """Image error caused by running one step so, by step and age of what the pattern takes from earlier steps."""

    source: Source
    """What ages: stale stage activations, the remembered estimates (`delta`, `last`), or nothing."""
    gap: int | None = Field(default=None, ge=1)
    """Of patterns with a trend: steps between the two exact ones that the line is drawn through. They have a curve per
    measured gap; the others none."""
    rmse: tuple[tuple[Annotated[float, Field(ge=0)], ...], ...]
    """`rmse[step][age - 1]`: root mean square error of the final image (values in [0, 1]), geometric mean over
    prompts. Source `none` has one column."""

    @property
    def max_age(self) -> int:
        """Largest age that was measured."""
        return len(self.rmse[0])


class PatternErrors(Data):
    """Error curves of one pattern; the error of a step is the sum over its sources (of a trend, at its gap)."""

    pattern: str
    curves: tuple[ErrorCurve, ...] = Field(min_length=1)


def at_gap(curves: Sequence[ErrorCurve], gap: int) -> tuple[ErrorCurve, ...]:
    """The curves that hold at a gap of a trend: those without one, and of the others the ones measured at the least gap
    that is not smaller. None of those where the gap is larger than all that were measured."""
    measured = [curve.gap for curve in curves if curve.gap is not None and curve.gap >= gap]
    if not measured:
        return tuple(curve for curve in curves if curve.gap is None)
    return tuple(curve for curve in curves if curve.gap in (None, min(measured)))


class ErrorSampling(Data):
    """How finely errors were measured; what lies between was interpolated."""

    prompts: int = Field(ge=1)
    """Prompts whose errors by step and age were measured (all of the profile's were used for whole schedules)."""
    probes: int = Field(ge=1)
    """Random image directions per prompt."""
    measured_steps: int = Field(ge=1)
    """Steps at which errors were measured."""
    ages: tuple[int, ...]
    """Ages that were measured."""
    estimator_db: float = Field(ge=0)
    """Standard error of a single value, from the number of prompts and probes."""
    weights: dict[str, float] = Field(default={})
    """By kind of error (combination of estimates / what ages), the factor by which whole schedules corrected the
    curves; applied to them already."""
