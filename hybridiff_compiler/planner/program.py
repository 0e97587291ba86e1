"""The dynamic program under the schedule solver: least error by step, state and latency in ticks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .states import StateSpace
from .tables import StepTable

__all__ = ["Program", "to_ticks"]


class Program:
    """One solve. `labels[state, tick]` is the least error of any way to be in `state` after the current step having
    spent `tick`; a back pointer per label says over which transition it came."""

    def __init__(self, tables: Sequence[StepTable], space: StateSpace, ticks: NDArray[np.int64]) -> None:
        self._tables, self._space, self._ticks = tables, space, ticks
        self._exact = next(p for p, table in enumerate(tables) if table.pattern.is_exact)
        # Transitions by target, those by the exact pattern first, in order of states.
        incoming: list[list[tuple[int, int]]] = [[] for _ in range(len(space))]
        for state, target in enumerate(space.target[self._exact]):
            incoming[target].append((self._exact, state))
        self._repaired = {
            target: np.array([state for _, state in edges]) for target, edges in enumerate(incoming) if edges
        }
        for p, table in enumerate(tables):
            if not table.pattern.is_exact:
                for state, target in enumerate(space.target[p]):
                    if target >= 0:
                        incoming[target].append((p, state))
        self._cheap = [edges[len(self._repaired.get(state, ())) :] for state, edges in enumerate(incoming)]
        self._first = np.cumsum([0, *map(len, incoming)])
        self._edges = np.array([edge for edges in incoming for edge in edges], dtype=np.int32)
        self._pointer = np.dtype(np.int16 if max(map(len, incoming)) < 2**15 else np.int32)

    def solve(self, num_steps: int, exact_head: int, exact_tail: int) -> tuple[NDArray[np.int16], int]:
        """The Pareto-optimal schedules as pattern indices `[point, step]`, and the number of labels."""
        exact_ticks = int(self._ticks[self._exact])
        labels = np.full((len(self._space), exact_ticks + 1), np.inf)
        labels[0, exact_ticks] = 0.0
        reached = np.zeros(len(self._space), dtype=bool)
        reached[0] = True
        pointers: list[NDArray[np.integer]] = []
        count = 1
        for step in range(1, num_steps):
            only_exact = step < exact_head or step >= num_steps - exact_tail
            labels, pointer, reached = self._advance(labels, reached, step, only_exact)
            pointers.append(pointer)
            count += int(np.isfinite(labels).sum())
        return self._trace(labels, pointers), count

    def _advance(
        self, labels: NDArray[np.float64], reached: NDArray[np.bool_], step: int, only_exact: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.integer], NDArray[np.bool_]]:
        states, width = labels.shape
        after = np.full((states, width + int(self._ticks.max())), np.inf)
        pointer: NDArray[np.integer] = np.zeros(after.shape, dtype=self._pointer)
        reached_after = np.zeros(states, dtype=bool)

        shift = int(self._ticks[self._exact])
        for target, sources in self._repaired.items():
            numbers = np.flatnonzero(reached[sources])
            if not len(numbers):
                continue
            reached_after[target] = True
            active = labels[sources[numbers]]
            least = active.argmin(axis=0)
            after[target, shift : shift + width] = np.take_along_axis(active, least[None, :], axis=0)[0]
            pointer[target, shift : shift + width] = numbers[least]
        if only_exact:
            return after, pointer, reached_after

        errors = self._space.errors(self._tables, step)
        offsets = self._ticks.tolist()
        candidate, better = np.empty(width), np.empty(width, dtype=bool)
        for target, edges in enumerate(self._cheap):
            skipped = len(self._repaired.get(target, ()))
            for number, (p, state) in enumerate(edges, start=skipped):
                if not reached[state]:
                    continue
                reached_after[target] = True
                here = slice(offsets[p], offsets[p] + width)
                np.add(labels[state], errors[p, state], out=candidate)
                np.less(candidate, after[target, here], out=better)
                np.copyto(after[target, here], candidate, where=better)
                np.copyto(pointer[target, here], number, where=better, casting="unsafe")
        return after, pointer, reached_after

    def _trace(self, labels: NDArray[np.float64], pointers: list[NDArray[np.integer]]) -> NDArray[np.int16]:
        """Schedules of the labels at the end, after an exact step, that no cheaper label beats."""
        last = np.array([0, *self._repaired]) if not pointers else np.array(list(self._repaired))
        final = labels[last].min(axis=0)
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(final)[:-1]])
        ticks = np.flatnonzero(final < best_before)
        states = last[labels[np.ix_(last, ticks)].argmin(axis=0)]
        choices = np.full((len(ticks), len(pointers) + 1), self._exact, dtype=np.int16)
        for step in range(len(pointers), 0, -1):
            edges = self._edges[self._first[states] + pointers[step - 1][states, ticks]]
            choices[:, step] = edges[:, 0]
            ticks = ticks - self._ticks[edges[:, 0]]
            states = edges[:, 1].astype(np.int64)
        return choices


def to_ticks(latency: NDArray[np.float64], finest: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Latencies above the smallest as whole ticks, and what rounding left over (in seconds).

    The tick is the largest one that fits all of them exactly, if the slowest is at most `finest` ticks then; otherwise
    the best fitting one of those that divide the slowest into `finest / 2` to `finest` ticks.
    """
    above = latency - latency.min()
    slowest = float(above.max())
    if slowest <= 0:
        return np.zeros(len(latency), dtype=np.int64), above
    best: tuple[float, NDArray[np.int64], NDArray[np.float64]] | None = None
    for count in range(1, finest + 1):
        tick = slowest / count
        ticks = np.rint(above / tick).astype(np.int64)
        rest = above - ticks * tick
        spread = float(np.ptp(rest))
        if spread <= 1e-9 * slowest:
            return ticks, rest
        if 2 * count >= finest and (best is None or spread < best[0]):
            best = (spread, ticks, rest)
    assert best is not None, "finest is at least 1"
    return best[1], best[2]
