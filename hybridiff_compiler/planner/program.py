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
        # Transitions by target. State 0 is entered by the exact pattern from every state, in order of states.
        incoming: list[list[tuple[int, int]]] = [[] for _ in range(len(space))]
        incoming[0] = [(self._exact, state) for state in range(len(space))]
        for p, table in enumerate(tables):
            if not table.pattern.is_exact:
                for state, target in enumerate(space.target[p]):
                    if target >= 0:
                        incoming[target].append((p, state))
        self._cheap = [edges[len(space):] if state == 0 else edges for state, edges in enumerate(incoming)]
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
        return self._trace(labels[0], pointers), count

    def _advance(
        self, labels: NDArray[np.float64], reached: NDArray[np.bool_], step: int, only_exact: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.integer], NDArray[np.bool_]]:
        states, width = labels.shape
        after = np.full((states, width + int(self._ticks.max())), np.inf)
        pointer: NDArray[np.integer] = np.zeros(after.shape, dtype=self._pointer)
        reached_after = np.zeros(states, dtype=bool)
        reached_after[0] = True

        rows = np.flatnonzero(reached)
        active = labels[rows]
        least = active.argmin(axis=0)
        shift = int(self._ticks[self._exact])
        after[0, shift : shift + width] = np.take_along_axis(active, least[None, :], axis=0)[0]
        pointer[0, shift : shift + width] = rows[least]
        if only_exact:
            return after, pointer, reached_after

        errors = self._space.errors(self._tables, step)
        offsets = self._ticks.tolist()
        candidate, better = np.empty(width), np.empty(width, dtype=bool)
        for target, edges in enumerate(self._cheap):
            skipped = states if target == 0 else 0
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

    def _trace(self, final: NDArray[np.float64], pointers: list[NDArray[np.integer]]) -> NDArray[np.int16]:
        """Schedules of the labels in state 0 at the end that no cheaper label beats."""
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(final)[:-1]])
        ticks = np.flatnonzero(final < best_before)
        states = np.zeros(len(ticks), dtype=np.int64)
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
