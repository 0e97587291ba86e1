"""Schedules: one pattern name per denoising step, fixed in advance or found while generating."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .data import Data
from .errors import InputError

__all__ = ["AdaptiveSchedule", "FixedSchedule", "Schedule", "format_steps", "parse_steps"]

_RUN = re.compile(r"([\w.:@+-]+?)(?:\*(\d+))?")


def format_steps(steps: tuple[str, ...]) -> str:
    """Run-length form of a schedule, e.g. `branch*15 paper*5 branch*30`."""
    runs = [(name, len(list(group))) for name, group in groupby(steps)]
    return " ".join(name if count == 1 else f"{name}*{count}" for name, count in runs)


def parse_steps(text: str) -> tuple[str, ...]:
    """Inverse of `format_steps`.

    Raises:
        InputError: a word is not `NAME` or `NAME*COUNT` with COUNT at least 1.
    """
    steps: list[str] = []
    for word in text.split():
        match = _RUN.fullmatch(word)
        if match is None or match[2] == "0":
            raise InputError(f"schedule word {word!r} is not of the form NAME or NAME*COUNT (COUNT >= 1)")
        steps.extend([match[1]] * int(match[2] or 1))
    return tuple(steps)


class FixedSchedule(Data):
    """One pattern name per step, known in advance."""

    kind: Literal["fixed"] = "fixed"
    steps: tuple[str, ...] = Field(min_length=1)

    @property
    def num_steps(self) -> int:
        """Number of denoiser calls of one generation."""
        return len(self.steps)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Names of the patterns that can occur, in order of first use."""
        return tuple(dict.fromkeys(self.steps))

    def __str__(self) -> str:
        return format_steps(self.steps)


class AdaptiveSchedule(Data):
    """Adaptive parallelism switching (METHOD.md, "Switching rule"; paper section on adaptive switching).

    Steps run `warmup` until the denoising discrepancy m_i has flattened: the first step i with
    `0 <= (m[i-L+1] - m[i]) / L < eps` and more than L values known sets tau1 = i; if none is found by step
    `tau_cap - 1`, tau1 = tau_cap. Steps `[tau1 + lag, tau1 + lag + k)` run `window`, all later ones `warmup` again.
    When the cap fires the window starts at `tau_cap` itself.
    """

    kind: Literal["adaptive"] = "adaptive"
    num_steps: int = Field(ge=1)
    warmup: str
    """Exact pattern of the warm-up and fully-connecting phases."""
    window: str
    """Pattern of the parallelism phase."""
    history: int = Field(ge=1)
    """L: how many steps the slope spans."""
    eps: float = Field(gt=0)
    """Slope under which the curve counts as flat."""
    k: int = Field(ge=0)
    """Length of the parallelism phase in steps."""
    tau_cap: int = Field(ge=1)
    """Latest start of the parallelism phase."""
    lag: int = Field(default=2, ge=1)
    """Steps between measuring m_i and the first step that may act on it. 1 acts on the very next step and makes the
    driver wait for the device; 2 leaves a whole step for the value to arrive, so nothing waits."""

    @model_validator(mode="after")
    def _cap(self) -> Self:
        if self.tau_cap + self.k > self.num_steps:
            raise ValueError(
                f"tau_cap + k = {self.tau_cap + self.k} must not exceed the {self.num_steps} steps; lower tau_cap or k"
            )
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        """Names of the patterns that can occur."""
        return (self.warmup, self.window)

    def window_start(self, discrepancies: tuple[float, ...] | list[float]) -> int | None:
        """First step of the parallelism phase, given m_0..m_n of the steps measured so far; None if not yet known."""
        for i in range(self.history, min(len(discrepancies), self.tau_cap - self.lag + 1)):
            slope = (discrepancies[i - self.history + 1] - discrepancies[i]) / self.history
            if 0 <= slope < self.eps:
                return i + self.lag
        return self.tau_cap if len(discrepancies) + self.lag > self.tau_cap else None

    def resolve(self, discrepancies: tuple[float, ...] | list[float]) -> FixedSchedule:
        """The schedule that a generation with these discrepancies (one per warm-up step) runs."""
        start = self.window_start(discrepancies)
        start = self.tau_cap if start is None else start
        rest = self.num_steps - start - self.k
        steps = (self.warmup,) * start + (self.window,) * self.k + (self.warmup,) * rest
        return FixedSchedule(steps=steps)

    def __str__(self) -> str:
        return (
            f"adaptive {self.warmup} -> {self.window}*{self.k} -> {self.warmup} "
            f"(L={self.history} eps={self.eps:g} cap={self.tau_cap}, {self.num_steps} steps)"
        )


Schedule = Annotated[FixedSchedule | AdaptiveSchedule, Field(discriminator="kind")]
