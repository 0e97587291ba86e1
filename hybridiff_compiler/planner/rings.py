"""Rings: a nested split of any number of stages, for graphs whose two ends exchange more than their middle does.

Stage 0 is an inner run of layers, every further stage the layers on either side of the one before it. The two ends of
a U-Net, which its skip connections tie together, so share a stage, and what crosses a border is small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..ir import InputError, LayerGraph, Partition, UsageError
from .crossing import bytes_in, bytes_out
from .layer_times import check_costs, check_slack, inner_runs

__all__ = ["rings"]

_TOLERANCE = 1e-9
_Window = tuple[int, NDArray[np.int64], NDArray[np.int64]]


def rings(
    graph: LayerGraph, costs: Sequence[float], stages: int, *, slack: float = 0.0, name: str | None = None
) -> Partition:
    """Symmetric or lopsided rings around an inner run, none slower than the best balance allows.

    Objective: first the least possible time of the slowest stage, `T`; then, among all ring partitions without a stage
    slower than `(1 + slack) T`, the fewest bytes over all borders (a border's bytes are those of the values that cross
    it in either direction). What may be inside is as in `nested`, of which this is the version for any number of
    stages; empty sides of a ring are allowed, empty rings are not.

    Algorithm: `bytes[k, i, j]`, the fewest bytes of `k` stages that fill the run `[i, j)`, is the least of
    `bytes[k-1, a, b] + border[a, b]` over the runs `[a, b)` in it that leave at most `T` around: for each `a` that is
    a range of `b`, whose minimum a sparse table gives at once. O(stages x layers^2 x w) after O(layers^2 log layers)
    per stage, with `w` the number of layers that fit into one stage. `T` itself comes from a bisection over the same
    recurrence on truth values. An interval dynamic program in the manner of Tarnawski et al. (NeurIPS 2020), whose
    ideals are the suffixes and prefixes of runs here.

    Raises:
        UsageError: fewer than two stages, `costs` does not fit the graph, or `slack` is negative.
        InputError: the graph has too few layers for so many stages.
    """
    if stages < 2:
        raise UsageError(f"got {stages} rings; a nested split has 2 stages or more")
    seconds = check_costs(graph, costs)
    check_slack(slack)
    if stages > len(seconds):
        raise InputError(f"{len(seconds)} layers cannot make {stages} rings; ask for at most {len(seconds)}")
    for allowed in inner_runs(graph):
        search = _Search(seconds, allowed, bytes_in(graph) + bytes_out(graph), stages)
        least = search.least_bound()
        if least is None:
            continue  # the strict choice of inner runs leaves no room for so many rings
        borders = search.fewest_bytes(least * (1 + slack))
        outside = [(0, len(seconds)), *borders]
        layers = []
        for (i, j), (a, b) in zip(outside, [*borders, (outside[-1][1], outside[-1][1])]):
            layers.append(graph.names[i:a] + graph.names[b:j])
        return Partition(name=name or f"nested{stages}", stages=tuple(reversed(layers)))
    raise InputError(
        f"{len(seconds)} layers with the output at position {graph.names.index(graph.output)} cannot make {stages} "
        "rings; ask for fewer stages"
    )


class _Search:
    """Both recurrences for one graph and number of stages; runs `[i, j)` are entries of square arrays."""

    def __init__(
        self, seconds: NDArray[np.float64], allowed: NDArray[np.bool_], border: NDArray[np.int64], stages: int
    ) -> None:
        self._begin = np.concatenate([[0.0], np.cumsum(seconds)])
        self._size, self._stages, self._seconds = len(seconds), stages, seconds
        self._allowed = allowed
        self._border = np.where(allowed, border.astype(float), np.inf)
        self._times = self._begin[None, :] - self._begin[:, None]
        self._start, self._end = np.indices(self._times.shape)

    def least_bound(self) -> float | None:
        """The least time of the slowest stage; None when there is no ring partition at all."""
        total = float(self._begin[-1])
        if not self._feasible(total):
            return None
        low, high = max(total / self._stages, float(self._seconds.max())) * (1 - _TOLERANCE), total
        if self._feasible(low * (1 + 2 * _TOLERANCE)):
            return low * (1 + 2 * _TOLERANCE)
        while high - low > 1e-7 * total:
            middle = (low + high) / 2
            if self._feasible(middle):
                high = middle
            else:
                low = middle
        return high

    def fewest_bytes(self, bound: float) -> list[tuple[int, int]]:
        """The borders of the best rings, outermost first."""
        windows = list(self._windows(bound))
        fits = self._times <= bound * (1 + _TOLERANCE)
        tables = [np.where((self._start < self._end) & fits, 0.0, np.inf)]
        for _ in range(2, self._stages):
            reach = tables[-1] + self._border
            tables.append(self._least_inside(reach, windows))
        borders = []
        i, j = 0, self._size
        for table in reversed(tables):
            reach = table + self._border
            outside = self._times[i, j] - self._times
            inside = (self._start >= i) & (self._end <= j) & ((self._start > i) | (self._end < j))
            choice = np.where(inside & (outside <= bound * (1 + _TOLERANCE)), reach, np.inf)
            i, j = (int(index) for index in np.unravel_index(int(np.argmin(choice)), choice.shape))
            borders.append((i, j))
        return borders

    def _feasible(self, bound: float) -> bool:
        windows = list(self._windows(bound))
        reach = (self._start < self._end) & (self._times <= bound * (1 + _TOLERANCE))
        for _ in range(2, self._stages + 1):
            reach = reach & self._allowed
            counts = np.concatenate([np.zeros((self._size + 1, 1), int), reach.cumsum(axis=1)], axis=1)
            filled = np.zeros_like(reach)
            for offset, low, high in windows:
                rows = np.arange(offset, self._size + 1)[:, None]
                found = counts[rows, high + 1] > counts[rows, np.minimum(low, high + 1)]
                filled[: self._size + 1 - offset] |= found
            reach = filled
        return bool(reach[0, self._size])

    def _windows(self, bound: float) -> Iterator[_Window]:
        """Per number of layers left of the inner run: the first and last end that it may have, `[i, j]`."""
        columns = np.arange(self._size + 1)
        limit = bound * (1 + _TOLERANCE)
        for offset in range(self._size):
            left = self._begin[offset:] - self._begin[: self._size + 1 - offset]
            if left.min() > limit:
                return
            earliest = self._begin[None, :] - (limit - left)[:, None]
            low = np.searchsorted(self._begin, earliest)
            low = np.maximum(low, np.arange(offset, self._size + 1)[:, None] + 1)
            high = np.broadcast_to(columns - (offset == 0), low.shape)
            low = np.where((left > limit)[:, None], self._size + 1, low)
            yield offset, np.minimum(low, self._size + 1), high

    def _least_inside(self, reach: NDArray[np.float64], windows: Sequence[_Window]) -> NDArray[np.float64]:
        """`[i, j]`: the least of `reach` over the runs inside that the windows allow."""
        levels = [reach]
        while 2 ** len(levels) <= self._size + 1:
            half, before = 2 ** (len(levels) - 1), levels[-1]
            shifted = np.full_like(before, np.inf)
            shifted[:, : -half] = before[:, half:]
            levels.append(np.minimum(before, shifted))
        tables = np.stack(levels)
        best = np.full_like(reach, np.inf)
        for offset, low, high in windows:
            rows = np.arange(offset, self._size + 1)[:, None]
            length = high - low + 1
            level = np.log2(np.maximum(length, 1)).astype(int)
            left = tables[level, rows, np.minimum(low, self._size)]
            right = tables[level, rows, np.clip(high - 2**level + 1, 0, self._size)]
            value = np.where(length > 0, np.minimum(left, right), np.inf)
            np.minimum(best[: self._size + 1 - offset], value, out=best[: self._size + 1 - offset])
        return best
