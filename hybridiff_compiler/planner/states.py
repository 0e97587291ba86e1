"""The states a generation can be in between two steps, as far as error is concerned: a finite automaton over ages.

`AgeModel` has one age per slot that some pattern reads. Here the same is said with as few ages (*clocks*) as possible,
which is exact:

- what only exact steps renew ages alike, whatever it is, and slots renewed by the same patterns are one clock;
- a pattern's error depends on its oldest read, so a slot that is renewed whenever another of its reads is renewed can
  never be the oldest and need not be looked at;
- beyond the largest age that was measured, all ages mean "too old" and are one.

Where a pattern has a trend, a state also holds the gap between the last two exact steps, as the measured gap that
counts for it. Exact steps then lead to different states: the gap is how old the remembered estimates were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .tables import StepTable

__all__ = ["StateSpace", "state_space"]

Clock = frozenset[int]
"""The cheap patterns (by index) that set the clock back; exact ones set all clocks back."""
_EXACT_ONLY: Clock = frozenset()


@dataclass(frozen=True)
class StateSpace:
    """Reachable states after an exact first step; state 0 is the one right after it."""

    ages: tuple[tuple[int, ...], ...]
    """Per state, the age of every clock, and the gap last where some pattern has a trend."""
    target: NDArray[np.int32]
    """`[pattern, state]`: where a step leads, or -1 where the pattern may not run."""
    activation_age: NDArray[np.int32]
    """`[pattern, state]`; 0 where it does not matter."""
    memory_age: NDArray[np.int32]
    """`[pattern, state]`; 0 where it does not matter."""
    gap: NDArray[np.int32]
    """`[pattern, state]`; 0 where it does not matter."""

    def __len__(self) -> int:
        return len(self.ages)

    def error(self, tables: Sequence[StepTable], step: int, pattern: int) -> NDArray[np.float64]:
        """`[state]`: error of running `step` by `pattern`; meaningless where it may not run."""
        if tables[pattern].pattern.is_exact:
            return np.zeros(len(self))
        return tables[pattern].errors(
            step, self.activation_age[pattern], self.memory_age[pattern], self.gap[pattern]
        )

    def errors(self, tables: Sequence[StepTable], step: int) -> NDArray[np.float64]:
        """`[pattern, state]`: error of running `step` so; infinite where it may not run."""
        result = np.stack([self.error(tables, step, p) for p in range(len(tables))])
        result[self.target < 0] = np.inf
        return result


def state_space(tables: Sequence[StepTable], *, limit: int | None = None, cautious: bool = False) -> StateSpace | None:
    """All states that schedules over `tables` can reach, or None when there are more than `limit`.

    With `cautious`, what a pattern reads but does not renew itself counts as renewed by exact steps alone; ages are
    then never too small. Breadth-first search: O(states x patterns x clocks).
    """
    reads = [_reads(tables, p, cautious) for p in range(len(tables))]
    caps: dict[Clock, int] = {}
    for table, clocks in zip(tables, reads):
        for clock in clocks:
            caps[clock] = max(caps.get(clock, 1), (table.activation_limit or 1) + 1)
        if table.memory_limit is not None:
            caps[_EXACT_ONLY] = max(caps.get(_EXACT_ONLY, 1), max(table.memory_limit, *table.gaps, 1) + 1)
    gaps = sorted({gap for table in tables for gap in table.gaps})
    order = list(caps)
    index = {clock: i for i, clock in enumerate(order)}
    memory = index.get(_EXACT_ONLY)
    renewed = [[p in clock for clock in order] for p in range(len(tables))]
    read_indices = [[index[clock] for clock in clocks] for clocks in reads]

    start = (*(1,) * len(order), *(gap + 1 for gap in gaps[-1:]))
    number = {start: 0}
    ages = [start]
    rows: list[list[tuple[int, int, int, int]]] = []
    for state in ages:  # grows while it is walked
        fresh_pair = start if memory is None or not gaps else (*start[:-1], _counted(gaps, state[memory]))
        older = tuple(min(age + 1, caps[clock]) for age, clock in zip(state, order))
        row = []
        for p, table in enumerate(tables):
            if table.pattern.is_exact:
                row.append((number.setdefault(fresh_pair, len(ages)), 0, 0, 0))
                if len(number) > len(ages):
                    ages.append(fresh_pair)
                continue
            activation = max((state[i] for i in read_indices[p]), default=0)
            remembered = 0 if table.memory_limit is None or memory is None else state[memory]
            gap = state[-1] if table.gaps else 0
            if (
                activation > (table.activation_limit or activation) or remembered > (table.memory_limit or remembered)
                or not table.reaches(remembered, gap)
            ):
                row.append((-1, activation, remembered, gap))
                continue
            after = (*(1 if fresh else age for fresh, age in zip(renewed[p], older)), *state[len(order) :])
            if after not in number:
                if limit is not None and len(ages) >= limit:
                    return None
                number[after] = len(ages)
                ages.append(after)
            row.append((number[after], activation, remembered, gap))
        rows.append(row)
    table_of = np.array(rows, dtype=np.int32).reshape(len(ages), len(tables), 4).transpose(2, 1, 0)
    return StateSpace(tuple(ages), table_of[0], table_of[1], table_of[2], table_of[3])


def _counted(gaps: Sequence[int], gap: int) -> int:
    """The measured gap that counts for a gap, or one more than the largest."""
    return next((measured for measured in gaps if measured >= gap), gaps[-1] + 1)


def _reads(tables: Sequence[StepTable], index: int, cautious: bool) -> list[Clock]:
    """The clocks whose oldest is the age of pattern `index`'s stale activations."""
    table = tables[index]
    if table.activations is None:
        return []
    slots = {(read.branch, read.stage) for unit in table.pattern.units for read in unit.reads if read.stale}
    computed = [
        frozenset((unit.branch, unit.stage) for unit in other.pattern.units)
        if not other.pattern.is_exact and other.pattern.partition == table.pattern.partition else frozenset()
        for other in tables
    ]
    clocks = set()
    for slot in slots:
        clock = frozenset(p for p, units in enumerate(computed) if slot in units)
        clocks.add(clock if index in clock or not cautious else _EXACT_ONLY)
    return [clock for clock in sorted(clocks, key=sorted) if not any(other < clock for other in clocks)]
