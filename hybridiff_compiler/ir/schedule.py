"""Schedules: one pattern name per denoising step, fixed in advance or found while generating.

Schedules that are found while generating share one interface, which the runtime follows without knowing the kind:
until `decide` answers, the steps of `undecided` run; its answer holds for the rest of the generation. `possible` lists
what the answer can be, so that a plan can be validated before it runs.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .data import Data
from .errors import InputError

__all__ = [
    "MAX_STEPS", "AdaptiveSchedule", "FixedSchedule", "Schedule", "Statistic", "SwitchedSchedule", "format_steps",
    "parse_steps",
]

MAX_STEPS = 10_000
"""Denoising steps of one generation: ten times as many as schedulers commonly have training timesteps."""

_RUN = re.compile(r"([\w.:@+-]+?)(?:\*(\d+))?")


def format_steps(steps: tuple[str, ...]) -> str:
    """Run-length form of a schedule, e.g. `branch*15 paper*5 branch*30`."""
    runs = [(name, len(list(group))) for name, group in groupby(steps)]
    return " ".join(name if count == 1 else f"{name}*{count}" for name, count in runs)


def parse_steps(text: str) -> tuple[str, ...]:
    """Inverse of `format_steps`.

    Raises:
        InputError: a word is not `NAME` or `NAME*COUNT` with COUNT at least 1, or there are too many steps.
    """
    steps: list[str] = []
    for word in text.split():
        match = _RUN.fullmatch(word)
        if match is None or match[2] == "0":
            raise InputError(f"schedule word {word!r} is not of the form NAME or NAME*COUNT (COUNT >= 1)")
        if len(match[2] or "") > len(str(MAX_STEPS)) or len(steps) + int(match[2] or 1) > MAX_STEPS:
            raise InputError(f"schedule word {word!r} makes more than {MAX_STEPS} steps")
        steps.extend([match[1]] * int(match[2] or 1))
    return tuple(steps)


class FixedSchedule(Data):
    """One pattern name per step, known in advance."""

    kind: Literal["fixed"] = "fixed"
    steps: tuple[str, ...] = Field(min_length=1, max_length=MAX_STEPS)

    @property
    def num_steps(self) -> int:
        """Number of denoiser calls of one generation."""
        return len(self.steps)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Names of the patterns that can occur, in order of first use."""
        return tuple(dict.fromkeys(self.steps))

    def possible(self) -> tuple[FixedSchedule, ...]:
        """Every schedule that a generation can run."""
        return (self,)

    def __str__(self) -> str:
        return format_steps(self.steps)


class AdaptiveSchedule(Data):
    """Adaptive parallelism switching (METHOD.md, "Switching rule"; paper section on adaptive switching).

    Steps run `warmup` until the denoising discrepancy m_i has flattened: the first step i with
    `0 <= (m[i-L+1] - m[i]) / L < eps` and more than L values known sets tau1 = i; if none is found by step
    `tau_cap - 1`, tau1 = tau_cap. Steps `[tau1 + lag, tau1 + lag + k)` run `window`, all later ones `warmup` again.
    When the cap fires the window starts at `tau_cap` itself.

    METHOD.md's interval `[tau1, tau1 + k]` names k + 1 steps. Where the slope fires, step tau1 has run already (its
    discrepancy is what fires), so with a lag of 1 the window is exactly the k steps that are left of it; where the cap
    fires it is k steps here as well, one fewer than the interval.
    """

    kind: Literal["adaptive"] = "adaptive"
    num_steps: int = Field(ge=1, le=MAX_STEPS)
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
        return self._starting_at(self.tau_cap if start is None else start)

    @property
    def undecided(self) -> FixedSchedule:
        """What runs until the window is known."""
        return FixedSchedule(steps=(self.warmup,) * self.num_steps)

    def decide(self, discrepancies: Sequence[float], step: int) -> FixedSchedule | None:
        """The schedule of this generation if it is known when `step` begins, from the values m_0..m_n that have
        arrived by then; else None."""
        start = self.window_start(list(discrepancies))
        return self.resolve(list(discrepancies)) if start is not None or step >= self.tau_cap else None

    def possible(self) -> tuple[FixedSchedule, ...]:
        """Every schedule that a generation can run: one per start of the window."""
        first = min(self.history + self.lag, self.tau_cap)
        return tuple(self._starting_at(start) for start in range(first, self.tau_cap + 1))

    def _starting_at(self, start: int) -> FixedSchedule:
        rest = self.num_steps - start - self.k
        return FixedSchedule(steps=(self.warmup,) * start + (self.window,) * self.k + (self.warmup,) * rest)

    def __str__(self) -> str:
        return (
            f"adaptive {self.warmup} -> {self.window}*{self.k} -> {self.warmup} "
            f"(L={self.history} eps={self.eps:g} cap={self.tau_cap}, {self.num_steps} steps)"
        )


Statistic = Literal["mean", "last", "slope"]
"""Of the first discrepancies m_0..m_(n-1): their mean, the last one, or the mean change per step."""


class SwitchedSchedule(Data):
    """Several fixed schedules, one of which each generation picks by the discrepancy of its first steps.

    `statistic` of m_0..m_(measured-1) is compared with `thresholds`: below the first one `choices[0]` runs, from the
    first up to the second `choices[1]`, and so on. The value decides `lag` steps after the last one was measured, as
    for `AdaptiveSchedule`; up to there all choices agree, and the steps that are measured are exact (a plan checks it).
    This is the paper's switching by denoising discrepancy (METHOD.md) with any schedules in place of one window.
    """

    kind: Literal["switched"] = "switched"
    choices: tuple[FixedSchedule, ...] = Field(min_length=1)
    thresholds: tuple[float, ...] = ()
    """Strictly increasing, one less than `choices`."""
    measured: int = Field(ge=1)
    """How many first steps are measured."""
    statistic: Statistic = "mean"
    lag: int = Field(default=2, ge=1)
    """See `AdaptiveSchedule.lag`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.thresholds) != len(self.choices) - 1:
            raise ValueError(
                f"{len(self.choices)} choices need {len(self.choices) - 1} thresholds, got {len(self.thresholds)}"
            )
        if any(low >= high for low, high in pairwise(self.thresholds)):
            raise ValueError(f"thresholds must increase strictly, got {list(self.thresholds)}")
        lengths = sorted({choice.num_steps for choice in self.choices})
        if len(lengths) > 1:
            raise ValueError(f"all choices must have equally many steps, got {lengths}")
        if self.measured > lengths[0]:
            raise ValueError(f"{self.measured} measured steps exceed the {lengths[0]} steps; lower measured")
        if self.statistic == "slope" and self.measured < 2:
            raise ValueError("the statistic 'slope' needs 2 measured steps or more")
        if len({choice.steps[: self.decided_at] for choice in self.choices}) > 1:
            raise ValueError(
                f"all choices must agree on steps 0 to {self.decided_at - 1}, which run before the choice is known; "
                "make them equal there or measure fewer steps"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Number of denoiser calls of one generation."""
        return self.choices[0].num_steps

    @property
    def decided_at(self) -> int:
        """First step that may differ between the choices."""
        return self.measured - 1 + self.lag

    @property
    def patterns(self) -> tuple[str, ...]:
        """Names of the patterns that can occur, in order of first use."""
        return tuple(dict.fromkeys(name for choice in self.choices for name in choice.steps))

    @property
    def undecided(self) -> FixedSchedule:
        """What runs until the choice is made; all choices agree there."""
        return self.choices[-1]

    def value(self, discrepancies: Sequence[float]) -> float:
        """The statistic of m_0, m_1, ...; later values than those measured do not count."""
        used = discrepancies[: self.measured]
        if self.statistic == "mean":
            return sum(used) / len(used)
        return used[-1] if self.statistic == "last" else (used[-1] - used[0]) / (len(used) - 1)

    def decide(self, discrepancies: Sequence[float], step: int) -> FixedSchedule | None:
        """The choice, if the values that have arrived when `step` begins suffice; else None."""
        return self.resolve(discrepancies) if len(discrepancies) >= self.measured else None

    def resolve(self, discrepancies: Sequence[float]) -> FixedSchedule:
        """The schedule that a generation with these discrepancies runs; without enough of them the last choice."""
        if len(discrepancies) < self.measured:
            return self.choices[-1]
        return self.choices[bisect_right(self.thresholds, self.value(discrepancies))]

    def possible(self) -> tuple[FixedSchedule, ...]:
        """Every schedule that a generation can run."""
        return self.choices

    def __str__(self) -> str:
        what = f"{self.statistic} rel-MAE of {self.measured} step{'s' * (self.measured != 1)}"
        below = "; ".join(f"< {limit:g}: {choice}" for limit, choice in zip(self.thresholds, self.choices))
        return f"switched by {what}: {below}{'; ' * bool(below)}else: {self.choices[-1]}"


Schedule = Annotated[FixedSchedule | AdaptiveSchedule | SwitchedSchedule, Field(discriminator="kind")]
