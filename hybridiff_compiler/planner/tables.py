"""Error tables: what running one step in some way does to the image, as arrays that the solver indexes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..ir import NEVER, AgeModel, Branch, Combine, InputError, Pattern, PatternErrors, UsageError

__all__ = ["StepTable", "prune_dominated", "schedule_errors", "step_tables"]

Slot = tuple[str, Branch, int]
_REMEMBERING = (Combine.DELTA, Combine.LAST)


@dataclass(frozen=True)
class StepTable:
    """One pattern as the solver sees it: the seconds a step takes, and its error by step and ages."""

    pattern: Pattern
    latency_s: float
    activations: NDArray[np.float64] | None = None
    """`[step, age - 1]`, or None when its error does not depend on the age of stale activations."""
    memory: NDArray[np.float64] | None = None
    """`[step, age - 1]`, or None when its error does not depend on the age of remembered estimates."""
    base: NDArray[np.float64] | None = None
    """`[step]`, or None when the rest has no error."""
    trends: NDArray[np.float64] | None = None
    """`[step, number of the gap, age - 1]` of a pattern with a trend, `memory` being None; else None. Infinite at ages
    that were not measured at that gap."""
    gaps: tuple[int, ...] = ()
    """The measured gaps of `trends`, rising; between two of them the larger one counts."""

    @property
    def activation_limit(self) -> int | None:
        """Largest measured age of stale activations; None when every age will do."""
        return None if self.activations is None else self.activations.shape[1]

    @property
    def memory_limit(self) -> int | None:
        """Largest measured age of remembered estimates; None when every age will do."""
        if self.trends is not None:
            return self.trends.shape[2]
        return None if self.memory is None else self.memory.shape[1]

    def reaches(self, age: int, gap: int) -> bool:
        """Whether a trend was measured at this age and gap; true without one."""
        number = next((k for k, measured in enumerate(self.gaps) if measured >= gap), None)
        if self.trends is None:
            return True
        return number is not None and age <= self.trends.shape[2] and bool(np.isfinite(self.trends[0, number, age - 1]))

    def errors(
        self, step: int, activation_age: NDArray[np.integer] | None, memory_age: NDArray[np.integer],
        gap: NDArray[np.integer] | None = None,
    ) -> NDArray[np.float64]:
        """Error of running `step` at these ages and, of a trend, this gap (arrays); infinite at such as were not
        measured."""
        total = np.full(memory_age.shape, 0.0 if self.base is None else self.base[step])
        for curve, ages in ((self.activations, activation_age), (self.memory, memory_age)):
            if curve is not None and ages is not None:
                width = curve.shape[1]
                total += np.where(ages <= width, curve[step, np.clip(ages, 1, width) - 1], np.inf)
        if self.trends is not None:
            assert gap is not None, "whoever follows ages follows the gap where a pattern has a trend"
            number, width = np.searchsorted(self.gaps, gap), self.trends.shape[2]
            known = (number < len(self.gaps)) & (memory_age <= width)
            at = self.trends[step, np.minimum(number, len(self.gaps) - 1), np.clip(memory_age, 1, width) - 1]
            total += np.where(known, at, np.inf)
        return total

    def limited(self, activation_age: int) -> StepTable:
        """The same table, usable at no older activations than `activation_age`."""
        if self.activations is None:
            return self
        return replace(self, activations=self.activations[:, :activation_age])


def step_tables(
    patterns: Sequence[Pattern], latencies: Mapping[str, float], errors: Mapping[str, PatternErrors]
) -> tuple[StepTable, ...]:
    """Tables of the exact patterns and of those whose errors were measured; the others cannot be planned with.

    Args:
        patterns: candidates.
        latencies: seconds per step, by pattern name.
        errors: measured curves, by pattern name. Curves of equal source add up.

    Raises:
        UsageError: a latency is missing.
        InputError: a curve is about something that the pattern does not take from earlier steps, or lacks its gap.
    """
    tables = []
    for pattern in patterns:
        if pattern.name not in latencies:
            raise UsageError(f"got no latency for pattern {pattern.name!r}; give seconds per step for every pattern")
        measured = errors.get(pattern.name)
        if pattern.is_exact:
            tables.append(StepTable(pattern, latencies[pattern.name]))
        elif measured is not None:
            table = StepTable(pattern, latencies[pattern.name])
            table = _with_trends(table, measured)
            for curve in measured.curves:
                if curve.gap is not None:
                    continue
                _check_source(pattern, curve.source)
                rmse = np.asarray(curve.rmse, dtype=float)
                if curve.source == "none":
                    table = replace(table, base=_sum(table.base, rmse[:, 0]))
                elif curve.source == "activations":
                    table = replace(table, activations=_sum(table.activations, rmse))
                else:
                    table = replace(table, memory=_sum(table.memory, rmse))
            tables.append(table)
    return tuple(tables)


def _with_trends(table: StepTable, measured: PatternErrors) -> StepTable:
    by_gap = {curve.gap: np.asarray(curve.rmse, dtype=float) for curve in measured.curves if curve.gap is not None}
    if bool(by_gap) != bool(table.pattern.trend):
        raise InputError(
            f"pattern {table.pattern} has a trend of {table.pattern.trend:g} and error curves at the gaps "
            f"{sorted(by_gap)}; patterns with a trend need a curve per gap, others must not have one"
        )
    if not by_gap:
        return table
    gaps, width = tuple(sorted(by_gap)), max(rmse.shape[1] for rmse in by_gap.values())
    trends = np.full((len(by_gap[gaps[0]]), len(gaps), width), np.inf)
    for number, gap in enumerate(gaps):
        trends[:, number, : by_gap[gap].shape[1]] = by_gap[gap]
    return replace(table, trends=trends, gaps=gaps)


def schedule_errors(tables: Sequence[StepTable], choices: NDArray[np.int16]) -> NDArray[np.float64]:
    """Summed step errors of schedules, `choices[schedule, step]` being indices into `tables`.

    Follows the ages of `AgeModel`, of all schedules at once; infinite where one reads what was never written or at an
    age that was not measured.
    """
    patterns = [table.pattern for table in tables]
    model = AgeModel.of(patterns)
    slots = {slot: number for number, slot in enumerate(model.slots, start=1)}
    used = np.unique(choices)
    reads = {index: _slots_read(patterns[index], slots) for index in used}
    renewed = {index: _slots_renewed(patterns[index], slots) for index in used}
    ages = np.full((len(choices), 1 + len(slots)), NEVER, dtype=np.int64)
    gap = np.full(len(choices), NEVER, dtype=np.int64)
    total = np.zeros(len(choices))
    for step, column in enumerate(choices.T):
        after = np.minimum(ages + 1, NEVER)
        for index in np.unique(column):
            rows, table = np.flatnonzero(column == index), tables[index]
            if table.pattern.is_exact:
                after[rows], gap[rows] = 1, ages[rows, 0]
                continue
            read = reads[index]
            oldest = ages[np.ix_(rows, read)].max(axis=1) if len(read) else None
            total[rows] += table.errors(step, oldest, ages[rows, 0], gap[rows])
            after[np.ix_(rows, renewed[index])] = 1
        ages = after
    return total


def _slots_read(pattern: Pattern, slots: Mapping[Slot, int]) -> NDArray[np.int64]:
    """Slots whose oldest is the age of the pattern's stale activations."""
    keys = {(pattern.partition, read.branch, read.stage) for u in pattern.units for read in u.reads if read.stale}
    return np.array(sorted(slots[key] for key in keys), dtype=np.int64)


def _slots_renewed(pattern: Pattern, slots: Mapping[Slot, int]) -> NDArray[np.int64]:
    """Slots that the pattern computes anew."""
    keys = [(pattern.partition, unit.branch, unit.stage) for unit in pattern.units]
    return np.array(sorted(slots[key] for key in keys if key in slots), dtype=np.int64)


def prune_dominated(tables: Sequence[StepTable]) -> tuple[StepTable, ...]:
    """Leave out every table that another one beats: no slower, and no more error at any step and age.

    An exact table beats every cheap one that is no faster. Two others are compared when the same things age in them,
    over the ages that both steps can meet (at step i nothing is older than i). Of two equal ones the first stays. What
    a pattern *renews* for others is not weighed, so the frontier is the optimum over what is left.
    O(patterns^2 x steps x ages).
    """
    kept: list[StepTable] = []
    for index, table in enumerate(tables):
        before = any(_beats(rival, table, earlier=True) for rival in kept)
        if not before and not any(_beats(rival, table, earlier=False) for rival in tables[index + 1:]):
            kept.append(table)
    return tuple(kept)


def _beats(rival: StepTable, table: StepTable, earlier: bool) -> bool:
    if rival.latency_s > table.latency_s or (table.pattern.is_exact and not rival.pattern.is_exact):
        return False
    if rival.pattern.is_exact and not table.pattern.is_exact:
        return True
    better = rival.latency_s < table.latency_s
    if (rival.trends is None) != (table.trends is None) or rival.gaps != table.gaps:
        return False
    pairs = [(rival.base, table.base), (rival.activations, table.activations), (rival.memory, table.memory)]
    if rival.trends is not None and table.trends is not None:
        pairs += [(rival.trends[:, gap], table.trends[:, gap]) for gap in range(len(table.gaps))]
    for mine, theirs in pairs:
        if mine is None and theirs is None:
            continue
        if mine is None or theirs is None:
            return False
        if mine.ndim == 2:
            if mine.shape[1] < theirs.shape[1]:
                return False
            better = better or mine.shape[1] > theirs.shape[1]
            reach = np.arange(len(theirs))[:, None] > np.arange(theirs.shape[1])[None, :]
            mine, theirs = mine[:, : theirs.shape[1]][reach], theirs[reach]
        if (mine > theirs).any():
            return False
        better = better or bool((mine < theirs).any())
    return better or earlier


def _check_source(pattern: Pattern, source: str) -> None:
    stale = any(read.stale for unit in pattern.units for read in unit.reads)
    used = stale if source == "activations" else source == "none" or pattern.combine in _REMEMBERING
    if not used:
        raise InputError(f"pattern {pattern} has an error curve over the age of {source}, which it does not use")


def _sum(first: NDArray[np.float64] | None, second: NDArray[np.float64]) -> NDArray[np.float64]:
    if first is None:
        return second
    width = min(first.shape[-1], second.shape[-1]) if first.ndim == 2 else first.shape[0]
    return first[..., :width] + second[..., :width]
