"""Ages: how many steps ago each thing that a pattern takes from earlier steps was computed.

The state of a generation, as far as image error is concerned, is a vector of ages. Every stage's activations have a
slot per branch, renewed when a unit computes them; an exact step renews all slots of all partitions. The remembered
estimates (`delta`, `last`) share one slot that only exact steps renew: at run time a cheap step refreshes them too,
with an error of its own, and counting that as no refresh is the cautious side. Patterns with a trend draw a line
through the last two exact steps, so how far those lie apart (the *gap*) is part of the state as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import InputError
from .pattern import Branch, Combine, Pattern

__all__ = ["NEVER", "AgeModel", "Ages", "check_reads"]

NEVER = 1 << 30
"""Age of a slot that was never written."""

Ages = tuple[int, ...]
Slot = tuple[str, Branch, int]


@dataclass(frozen=True)
class AgeModel:
    """Ages of all slots that a set of patterns reads; index 0 is the remembered pair of estimates, and the last one,
    where some pattern has a trend, the gap between the last two exact steps."""

    slots: tuple[Slot, ...]
    trend: bool = False
    """Whether the gap is followed."""

    @classmethod
    def of(cls, patterns: Iterable[Pattern]) -> AgeModel:
        """The model of the slots that `patterns` read stale."""
        slots: dict[Slot, None] = {}
        trend = False
        for pattern in patterns:
            trend = trend or bool(pattern.trend)
            for unit in pattern.units:
                for read in unit.reads:
                    if read.stale:
                        slots[pattern.partition, read.branch, read.stage] = None
        return cls(tuple(slots), trend)

    @property
    def start(self) -> Ages:
        """The state before step 0."""
        return (NEVER,) * (1 + len(self.slots) + self.trend)

    def advance(self, ages: Ages, pattern: Pattern, cap: int = NEVER) -> Ages:
        """The state after a step of `pattern`: what the *next* step finds (1 = computed in the step before it)."""
        width = 1 + len(self.slots)
        if pattern.is_exact:
            return (1,) * width + ages[:1] * self.trend
        older = [min(age + 1, NEVER if age >= NEVER else cap) for age in ages[:width]]
        computed = {(pattern.partition, u.branch, u.stage) for u in pattern.units}
        renewed = (1 if slot in computed else age for slot, age in zip(self.slots, older[1:]))
        return (older[0], *renewed, *ages[width:])

    def activation_age(self, ages: Ages, pattern: Pattern) -> int:
        """Largest age among the stage activations that `pattern` reads stale; 0 when it reads none."""
        index = {slot: i for i, slot in enumerate(self.slots, start=1)}
        return max(
            (ages[index[pattern.partition, read.branch, read.stage]]
             for unit in pattern.units for read in unit.reads if read.stale),
            default=0,
        )

    def memory_age(self, ages: Ages, pattern: Pattern) -> int:
        """Age of the remembered estimates if `pattern` uses them, else 0."""
        return ages[0] if pattern.combine in (Combine.DELTA, Combine.LAST) else 0

    def gap(self, ages: Ages, pattern: Pattern) -> int:
        """Steps between the last two exact ones if `pattern` has a trend, else 0."""
        return ages[-1] if pattern.trend else 0


def check_reads(steps: Sequence[Pattern]) -> None:
    """Dry run of a schedule: every stale read and every remembered estimate must have been produced before.

    Raises:
        InputError: naming the step, the pattern and what it reads too early.
    """
    written: set[Slot] = set()
    exact = remembered = False
    exact_steps = 0
    for index, pattern in enumerate(steps):
        for unit in pattern.units:
            for read in unit.reads:
                if read.stale and not exact and (pattern.partition, read.branch, read.stage) not in written:
                    raise InputError(
                        f"step {index}: pattern {pattern} reads {read} before any step computed it; "
                        "start the schedule with an exact pattern"
                    )
        if pattern.combine in (Combine.DELTA, Combine.LAST) and not remembered:
            raise InputError(
                f"step {index}: pattern {pattern} needs remembered estimates, but no earlier step computed both "
                "branches; start the schedule with an exact pattern"
            )
        if pattern.trend and exact_steps < 2:
            raise InputError(
                f"step {index}: pattern {pattern} extrapolates from two exact steps, but {exact_steps} came before it; "
                "start the schedule with two exact patterns"
            )
        exact_steps += pattern.is_exact
        written.update((pattern.partition, u.branch, u.stage) for u in pattern.units)
        exact = exact or pattern.is_exact  # an exact step renews the slots of every partition
        remembered = remembered or pattern.combine is Combine.CFG
