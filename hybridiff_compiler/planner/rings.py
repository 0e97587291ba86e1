"""Rings: a nested split of any number of stages, for graphs whose two ends exchange more than their middle does.

Stage 0 is an inner run of layers, every further stage the layers on either side of the one before it. The two ends of
a U-Net, which its skip connections tie together, so share a stage, and what crosses a border is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..ir import InputError, LayerGraph, Partition, UsageError
from .crossing import lost_across
from .layer_times import check_costs, check_slack, inner_runs
from .run_costs import Worker

__all__ = ["rings"]

MAX_BORDERS = 256
"""Places where rings may end; in longer graphs, those of that many stages of equal time."""
_TOLERANCE = 1e-9
_Window = tuple[int, NDArray[np.int64], NDArray[np.int64]]
"""Layers left of the inner run, and the least and largest end that it may have, `[i, j]` of the run around it."""


def rings(
    graph: LayerGraph, costs: Sequence[float], stages: int, *, workers: Sequence[Worker] | None = None,
    slack: float = 0.0, change: Mapping[str, float] | None = None, name: str | None = None,
) -> Partition:
    """Symmetric or lopsided rings around an inner run, none slower than the best balance allows.

    Objective: first the least possible time of the slowest stage, `T`, a stage taking the seconds of its layers over
    its worker's speed; then, among all ring partitions without a stage slower than `(1 + slack) T`, the fewest bytes
    over all borders (a border's bytes are those of the values that cross it in either direction), which with `change`
    are weighed by how much they lose when read one step old (`lost_across`). No stage's parameters exceed its worker's
    memory. What may be inside is as in `nested`, which for two stages also weighs the time of receiving; one side of a
    ring may be empty, a ring may not. In graphs of more than `MAX_BORDERS` layers the optimum is that over borders
    between that many stages of equal time, not over all of them.

    Algorithm: `bytes[k, i, j]`, the fewest bytes of `k` stages that fill the run `[i, j)`, is the least of
    `bytes[k-1, a, b] + border[a, b]` over the runs `[a, b)` in it that leave at most `T` around: for each `a` that is
    a range of `b`, whose minimum a sparse table gives at once. O(stages x layers^2 x (w + log layers)), with `w` the
    number of layers that fit into one stage. `T` comes from a bisection (to 1e-9 of it): with empty rings allowed,
    what `k` stages can fill is given by the largest end for each start, O(stages x layers x w); where empty rings
    would be used, the recurrence itself decides. An interval dynamic program in the manner of Tarnawski et al.
    (NeurIPS 2020), with runs for ideals.

    Args:
        graph, costs: layers and their seconds.
        stages: number of stages.
        workers: the rank of every stage, innermost first (default: equal ones); links have no say.
        slack: share by which the slowest stage may exceed the least possible, for the sake of fewer bytes.
        change: relative change of every value from step to step, where known.
        name: default `nested{stages}`.

    Raises:
        UsageError: fewer than two stages, not one worker for each, `costs` or `change` does not fit the graph, or
            `slack` is negative.
        InputError: the graph has too few layers for so many stages, or they do not fit into memory.
    """
    if stages < 2:
        raise UsageError(f"got {stages} rings; a nested split has 2 stages or more")
    ranks = (Worker(),) * stages if workers is None else tuple(workers)
    if len(ranks) != stages:
        raise UsageError(f"got {len(ranks)} workers for {stages} rings; give one per stage, innermost first")
    seconds = check_costs(graph, costs)
    check_slack(slack)
    if stages > len(seconds):
        raise InputError(f"{len(seconds)} layers cannot make {stages} rings; ask for at most {len(seconds)}")
    border = lost_across(graph, change)
    for allowed in inner_runs(graph):
        search = _Search(graph, seconds, border, allowed, ranks)
        borders = search.best(slack)
        if borders is None:
            continue  # the strict choice of inner runs leaves no room for so many rings
        spans = [(0, len(seconds)), *((int(search.places[a]), int(search.places[b])) for a, b in borders)]
        layers = [graph.names[i:a] + graph.names[b:j] for (i, j), (a, b) in pairwise(spans)]
        layers.append(graph.names[spans[-1][0] : spans[-1][1]])
        return Partition(name=name or f"nested{stages}", stages=tuple(reversed(layers)))
    raise InputError(
        f"{len(seconds)} layers with the output at position {graph.names.index(graph.output)} cannot make {stages} "
        "rings within the memory of their ranks; ask for fewer stages or give more memory"
    )


def _places(begin: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    """Positions in the layer order where rings may end."""
    if len(begin) <= limit + 1:
        return np.arange(len(begin))
    even = np.searchsorted(begin, np.linspace(0.0, begin[-1], limit + 1))
    return np.unique(np.concatenate([[0], np.minimum(even, len(begin) - 1), [len(begin) - 1]]))


class _Search:
    """The recurrences for one graph; runs `[i, j)` are entries of square arrays, stages count from the innermost."""

    def __init__(
        self, graph: LayerGraph, seconds: NDArray[np.float64], border: NDArray[np.int64], allowed: NDArray[np.bool_],
        ranks: Sequence[Worker],
    ) -> None:
        begin = np.concatenate([[0.0], np.cumsum(seconds)])
        self.places = _places(begin, max(MAX_BORDERS, 2 * len(ranks)))
        self._size = len(self.places) - 1
        self._begin = begin[self.places]
        parameters = [float(layer.parameter_bytes) for layer in graph.layers]
        self._bytes = np.concatenate([[0.0], np.cumsum(parameters)])[self.places]
        self._speeds = [rank.speed for rank in ranks]
        self._memory = [np.inf if rank.memory_bytes is None else float(rank.memory_bytes) for rank in ranks]
        runs = np.ix_(self.places, self.places)
        border, allowed = border[runs], allowed[runs]
        self._border = np.where(allowed, border.astype(float), np.inf)
        self._start, self._end = np.indices(border.shape)
        ends = np.where(allowed, self._end, 0).max(axis=1)
        self._farthest = np.maximum(ends, np.arange(self._size + 1))

    def best(self, slack: float) -> list[tuple[int, int]] | None:
        """The borders of the best rings, outermost first; None when there are none."""
        total = float(self._begin[-1])
        low, high = total / sum(self._speeds) * (1 - 1e-6), total / min(self._speeds)
        if not self._fills(high):
            return None
        least = self._bisect(low, high, self._fills)
        borders = self._fewest_bytes(least * (1 + slack))
        if borders is None:  # only with an empty ring
            if self._fewest_bytes(high) is None:
                return None
            least = self._bisect(least, high, lambda bound: self._fewest_bytes(bound) is not None)
            borders = self._fewest_bytes(least * (1 + slack))
        elif slack and self._fewest_bytes(least) is None:
            least = self._bisect(least, least * (1 + slack), lambda bound: self._fewest_bytes(bound) is not None)
            borders = self._fewest_bytes(least * (1 + slack))
        return borders

    def _bisect(self, low: float, high: float, feasible: Callable[[float], bool]) -> float:
        while high - low > _TOLERANCE * high:
            middle = (low + high) / 2
            low, high = (low, middle) if feasible(middle) else (middle, high)
        return high

    def _fills(self, bound: float) -> bool:
        """Whether the stages can hold all layers within `bound` seconds, empty rings allowed."""
        starts = np.arange(self._size + 1)
        reach = starts
        for stage, (speed, memory) in enumerate(zip(self._speeds, self._memory)):
            inner = np.minimum(reach, self._farthest) if stage else starts
            reach = starts.copy()
            for offset in range(self._size + 1):
                first, last = starts[: self._size + 1 - offset], starts[offset:]
                spare = self._spare(bound * speed, self._begin, first, last)
                room = self._spare(memory, self._bytes, first, last)
                fits = (spare >= 0) & (room >= 0)
                if not fits.any():
                    break
                end = np.minimum(
                    np.searchsorted(self._begin, self._begin[inner[offset:]] + spare, side="right"),
                    np.searchsorted(self._bytes, self._bytes[inner[offset:]] + room, side="right"),
                ) - 1
                head = reach[: self._size + 1 - offset]
                np.maximum(head, np.where(fits, end, 0), out=head)
        return bool(reach[0] == self._size)

    def _spare(
        self, limit: float, prefix: NDArray[np.float64], first: NDArray[np.int64], last: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """What `limit`, with some room for rounding, leaves beside the layers `[first, last)`."""
        return limit * (1 + _TOLERANCE) - (prefix[last] - prefix[first])

    def _fewest_bytes(self, bound: float) -> list[tuple[int, int]] | None:
        windows: dict[tuple[float, float], list[_Window]] = {}
        fits = (self._start < self._end) & self._within(0, bound)
        tables = [np.where(fits, 0.0, np.inf)]
        for stage in range(1, len(self._speeds) - 1):
            key = (self._speeds[stage], self._memory[stage])
            if key not in windows:
                windows[key] = list(self._windows(bound * key[0], key[1]))
            tables.append(self._least_inside(tables[-1] + self._border, windows[key]))
        borders = []
        i, j = 0, self._size
        for stage in range(len(tables), 0, -1):
            inside = (self._start >= i) & (self._end <= j) & ((self._start > i) | (self._end < j))
            choice = np.where(
                inside & self._within(stage, bound, i, j), tables[stage - 1] + self._border, np.inf
            )
            i, j = (int(index) for index in np.unravel_index(int(np.argmin(choice)), choice.shape))
            if not np.isfinite(choice[i, j]):
                return None
            borders.append((i, j))
        return borders

    def _within(self, stage: int, bound: float, i: int | None = None, j: int | None = None) -> NDArray[np.bool_]:
        """Whether a stage has time and memory for the layers of `[i, j)` around each run, or for each run itself."""
        result = np.ones(self._start.shape, dtype=bool)
        limits = ((self._begin, bound * self._speeds[stage]), (self._bytes, self._memory[stage]))
        for prefix, limit in limits:
            own = prefix[None, :] - prefix[:, None]
            load = own if i is None or j is None else prefix[j] - prefix[i] - own
            result &= load <= limit * (1 + _TOLERANCE)
        return result

    def _windows(self, limit: float, memory: float) -> Iterator[_Window]:
        columns = np.arange(self._size + 1)
        for offset in range(self._size):
            first, last = columns[: self._size + 1 - offset], columns[offset:]
            spare = self._spare(limit, self._begin, first, last)
            room = self._spare(memory, self._bytes, first, last)
            fits = (spare >= 0) & (room >= 0)
            if not fits.any():
                return
            low = np.searchsorted(self._begin, self._begin[None, :] - spare[:, None])
            if np.isfinite(memory):
                low = np.maximum(low, np.searchsorted(self._bytes, self._bytes[None, :] - room[:, None]))
            low = np.maximum(low, last[:, None] + 1)
            low = np.where(fits[:, None], low, self._size + 1)
            yield offset, low, np.broadcast_to(columns - (offset == 0), low.shape)

    def _least_inside(self, reach: NDArray[np.float64], windows: Sequence[_Window]) -> NDArray[np.float64]:
        """`[i, j]`: the least of `reach` over the runs inside that the windows allow."""
        levels = [reach]
        while 2 ** len(levels) <= self._size + 1:
            half, before = 2 ** (len(levels) - 1), levels[-1]
            shifted = np.full_like(before, np.inf)
            shifted[:, :-half] = before[:, half:]
            levels.append(np.minimum(before, shifted))
        tables = np.stack(levels)
        level_of = np.log2(np.maximum(np.arange(self._size + 2), 1)).astype(int)
        best = np.full_like(reach, np.inf)
        for offset, low, high in windows:
            rows = np.arange(offset, self._size + 1)[:, None]
            length = np.maximum(high - low + 1, 0)
            level = level_of[length]
            left = tables[level, rows, np.minimum(low, self._size)]
            right = tables[level, rows, np.clip(high - 2**level + 1, 0, self._size)]
            head = best[: self._size + 1 - offset]
            np.minimum(head, np.where(length > 0, np.minimum(left, right), np.inf), out=head)
        return best
