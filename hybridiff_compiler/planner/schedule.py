"""The schedule solver: the whole Pareto frontier of (latency, image error) in one dynamic program.

Objective: over all schedules of N steps that begin and end with exact steps, every latency that no other schedule
beats in error, with the error being the sum of the step errors at the ages that the schedule itself brings about.

Algorithm: a resource-constrained shortest path over (step, state), state being the automaton of `states.py`, with
latency as the resource. Latencies are whole multiples of a tick, so a node's labels are an array over ticks holding
the least error (the dynamic program of Joksch, 1966, J. Math. Anal. Appl. 14; labels of equal state and resource are
merged, which is dominance; see Irnich & Desaulniers, 2005, "Shortest path problems with resource constraints"). Back
pointers recover one optimal schedule per point. O(steps^2 x ticks per step x transitions) time.

Exactness: where the latencies are whole multiples of the tick (after taking out the smallest), the frontier is exact.
Otherwise each is rounded, and for every schedule there is a frontier point with no more error that is slower by at
most `Frontier.gap_s`; latencies and errors of the points themselves are recomputed without rounding.

Problems too large for that (hundreds of steps) are solved for the supported points alone, those on the lower convex
hull of the frontier, which needs no labels (`bound.Pricing`); between two neighbours nothing is known but the hull, so
`gap_s` is then the largest step from one to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..ir import UsageError
from .bound import Pricing
from .program import Program, to_ticks
from .states import StateSpace, state_space
from .tables import StepTable, schedule_errors

__all__ = ["Frontier", "one_exact", "solve_frontier"]

CELL_BUDGET = 1_000_000_000
"""Label updates that a solve may take (about 3 ns each); fixes the default number of ticks."""
MAX_STATES = 600
"""States beyond which ages are simplified (see `solve_frontier`)."""
POINTER_BYTES = 1_000_000_000
"""Back pointers that a solve may keep; fixes the number of ticks where `CELL_BUDGET` does not."""
HULL_CELLS = 1_000_000_000
"""Steps x patterns x states x prices that the search for supported points may touch (about 5 ns each)."""
_FINEST, _COARSEST = 256, 16


@dataclass(frozen=True, eq=False)
class Frontier:
    """Pareto-optimal schedules, fastest first; errors fall as latencies rise."""

    names: tuple[str, ...]
    latency_s: NDArray[np.float64]
    error: NDArray[np.float64]
    choices: NDArray[np.int16]
    """`[point, step]`: index into `names`."""
    gap_s: float
    """Certificate: no schedule of at most a point's error is faster than it by more than this."""
    states: int
    """States of the age automaton."""
    labels: int
    """Labels kept over all steps: pairs of state and tick that some schedule reaches."""
    simplified: bool
    """Whether ages were simplified; the certificate then holds among the schedules that were left."""
    supported_only: bool = False
    """Whether the points are those on the lower convex hull alone."""

    def __len__(self) -> int:
        return len(self.latency_s)

    def steps(self, point: int) -> tuple[str, ...]:
        """The schedule of one point: a pattern name per step."""
        return tuple(self.names[choice] for choice in self.choices[point])


def solve_frontier(
    tables: Sequence[StepTable],
    num_steps: int,
    *,
    exact_head: int = 1,
    exact_tail: int = 1,
    ticks: int | None = None,
    max_states: int = MAX_STATES,
) -> Frontier:
    """All Pareto-optimal schedules of `num_steps` steps over `tables`.

    Args:
        tables: candidates; at least one exact.
        num_steps: steps of a generation.
        exact_head, exact_tail: how many first and last steps must be exact, 1 or more each (one step may be both).
        ticks: latency of the slowest step above the fastest one, in ticks; default: as fine as `CELL_BUDGET` allows.
        max_states: when ages make more states than this, two simplifications are tried, both on the cautious side:
            what a pattern reads but does not renew counts as renewed by exact steps only; then ever fewer of the
            measured ages may be used. `Frontier.simplified` tells.

    Raises:
        UsageError: no exact table, or arguments out of range.
    """
    tables = one_exact(tables)
    if exact_head < 1 or exact_tail < 1 or num_steps < 1:
        raise UsageError(
            f"got {num_steps} steps with {exact_head} exact ones first and {exact_tail} last; each must be 1 or more"
        )
    used, space, simplified = _small_space(tables, max_states)
    latency = np.array([table.latency_s for table in used])
    edges = int((space.target >= 0).sum())
    affordable = min(
        2 * CELL_BUDGET / (num_steps**2 * max(1, edges)), POINTER_BYTES / (num_steps**2 * len(space))
    )
    if ticks is None and affordable < _COARSEST:
        pricing = Pricing(used, num_steps, exact_head=exact_head, exact_tail=exact_tail, space=space)
        prices = int(np.clip(HULL_CELLS / (num_steps * len(used) * len(space)), 8, 512))
        choices = np.stack([point.choices for point in pricing.hull(prices)])
        labels, gap_s, supported = prices * num_steps * len(space), None, True
    else:
        grid, rest = to_ticks(latency, ticks or int(np.clip(affordable, _COARSEST, _FINEST)))
        choices, labels = Program(used, space, grid).solve(num_steps, exact_head, exact_tail)
        gap_s, supported = num_steps * float(np.ptp(rest)), False
    error = schedule_errors(tables, choices)
    total = latency[choices].sum(axis=1)
    keep = _pareto(total, error)
    if gap_s is None:
        gap_s = float(np.diff(total[keep]).max(initial=0.0))
    return Frontier(
        names=tuple(table.pattern.name for table in used), latency_s=total[keep], error=error[keep],
        choices=choices[keep], gap_s=gap_s, states=len(space), labels=labels, simplified=simplified,
        supported_only=supported,
    )


def one_exact(tables: Sequence[StepTable]) -> tuple[StepTable, ...]:
    """`tables` with the fastest exact one alone: they all cause no error and leave the same state."""
    exact = [table for table in tables if table.pattern.is_exact]
    if not exact:
        raise UsageError("got no exact pattern; a schedule begins and ends with one")
    fastest = min(exact, key=lambda table: table.latency_s)
    return tuple(table for table in tables if table is fastest or not table.pattern.is_exact)


def _small_space(tables: tuple[StepTable, ...], limit: int) -> tuple[tuple[StepTable, ...], StateSpace, bool]:
    space = state_space(tables, limit=limit)
    if space is not None:
        return tables, space, False
    oldest = max((table.activation_limit or 1 for table in tables), default=1)
    for age in range(oldest, 0, -1):
        limited = tuple(
            table.limited(age) if _renews_its_reads(table) else table for table in tables
        )
        space = state_space(limited, limit=limit if age > 1 else None, cautious=True)
        if space is not None:
            return limited, space, True
    raise AssertionError("unreachable: the last attempt has no limit")


def _renews_its_reads(table: StepTable) -> bool:
    computed = {(unit.branch, unit.stage) for unit in table.pattern.units}
    return any(
        read.stale and (read.branch, read.stage) in computed for unit in table.pattern.units for read in unit.reads
    )


def _pareto(latency: NDArray[np.float64], error: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the points that no other beats, fastest first."""
    order = np.lexsort((error, latency))
    before = np.concatenate([[np.inf], np.minimum.accumulate(error[order])[:-1]])
    return order[error[order] < before]
