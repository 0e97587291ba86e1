"""The exact partitioner for ranks that differ: contiguous stages, one per rank, in a given or the best order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from ..ir import InputError, LayerGraph, Partition, UsageError
from .crossing import bytes_in, change_weights
from .layer_times import check_slack
from .run_costs import RunCosts, Worker, shared_layers
from .steady import steadiest_cuts

__all__ = ["Division", "any_order_is_searchable", "divide"]

MAX_CELLS = 5_000_000_000
"""Cells of run tables that a search for the best order may look at (about 2 ns each)."""
_Counts = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Division:
    """A partition and the rank of every stage."""

    partition: Partition
    order: tuple[int, ...]
    """Per stage, index of its rank among the workers."""
    seconds: tuple[float, ...]
    """Per stage: computing, recomputing and receiving on its rank."""
    memory_bytes: tuple[int, ...]
    """Per stage."""

    @property
    def slowest_s(self) -> float:
        """What was minimised."""
        return max(self.seconds)


def divide(
    graph: LayerGraph,
    costs: Sequence[float],
    workers: Sequence[Worker],
    *,
    overlap: bool = False,
    any_order: bool = False,
    recompute: bool | Iterable[str] = True,
    branches: int = 1,
    slack: float = 0.0,
    change: Mapping[str, float] | None = None,
    name: str = "linear",
) -> Division:
    """One contiguous stage per worker, the slowest as fast as possible, each within its worker's memory.

    Objective: minimise the largest stage time. A stage takes the seconds of its layers and of what it recomputes,
    over its worker's speed, and the time to receive every value from before it that it reads (each once): added, or
    with `overlap` the larger of the two. What is recomputed is chosen per stage from all sets of `recompute` layers
    (with everything that they depend on). The output layer is in the last stage. Layers are never divided, and the
    captured graph is free of mutation and aliases across layers, so no cut separates what shares memory.

    With `change`, the order of the ranks found stays, and of the divisions in it whose stages are up to `1 + slack`
    times slower, each recomputing what makes it fastest, the one is taken that receives the fewest bytes weighed by
    their change (`change_weights`): they are read one step old.

    Algorithm: a stage's time depends on its two borders and its rank alone, so a dynamic program over (ranks used,
    end of the last stage) is exact: `T[K, b] = min over r in K, a of max(T[K - r, a], time_r[a, b))`. In the given
    order `K` is a prefix: O(ranks x layers^2), PipeDream's recurrence without replication (Narayanan et al., SOSP 2019,
    section 3.1). For the best order `K` runs over sets of ranks, equal ranks counted and not named, in the manner of
    Tarnawski et al. (NeurIPS 2020, "Efficient algorithms for device placement"; 2021, "Piper") with memory as a
    constraint of each stage: O(product of (count + 1) x kinds x layers^2), where stages slower than the given order's
    best are left out. The tables of times cost
    O(2^recompute x layers^2) per kind of rank. Of several optima, the first order and the earliest cuts.

    Args:
        graph, costs: layers and their seconds on the profiled device.
        workers: the ranks.
        overlap: whether receiving hides behind computing.
        any_order: whether stages may be given to ranks in any order.
        recompute: layers that may be recomputed; True for `shared_layers`, False for none.
        branches: branches evaluated together, for the memory of activations.
        slack: share by which the slowest stage may exceed the least possible where `change` is known.
        change: relative change of every value from step to step.
        name: of the partition.

    Raises:
        UsageError: no workers, costs or changes that do not fit the graph, a negative slack, or too many different
            ranks for `any_order`.
        InputError: too few layers for so many stages, or no division fits into memory.
    """
    heads = (shared_layers(graph, costs) if recompute else ()) if isinstance(recompute, bool) else tuple(recompute)
    runs = RunCosts(graph, costs, recompute=heads, overlap=overlap, branches=branches)
    check_slack(slack)
    if not workers:
        raise UsageError("got no workers; a partition has 1 stage or more")
    if len(workers) > runs.last + 1:
        raise InputError(
            f"{runs.size} layers with the output at position {runs.last} cannot make {len(workers)} contiguous stages; "
            f"ask for at most {runs.last + 1}"
        )
    kinds = list(dict.fromkeys(workers))
    kind_of = [kinds.index(worker) for worker in workers]
    tables = [runs.table(kind) for kind in kinds]
    seconds = [table for table, _ in tables]
    found = _solve(list(_in_order(kind_of)), runs, seconds)
    if any_order and len(kinds) > 1:
        found = _solve(list(_in_any_order(kind_of, runs, tables)), runs, seconds, at_most=_slowest(found, seconds))
    if found is None:
        raise InputError(_too_little(graph, runs, workers))
    cuts, used = found
    if change is not None:
        weights = change_weights(graph, change)
        lost = [bytes_in(graph, {graph.names[k] for k in chosen}, weights) for chosen in runs.choices]
        losses = [np.take_along_axis(np.stack(lost), by[None], axis=0)[0] for _, by in tables]
        bound = _slowest(found, seconds) * (1 + slack)
        cuts = steadiest_cuts([seconds[kind] for kind in used], [losses[kind] for kind in used], bound, runs.last)
    free = {kind: [rank for rank, own in enumerate(kind_of) if own == kind] for kind in set(kind_of)}
    spans = list(pairwise(cuts))
    choices = [int(tables[kind][1][span]) for span, kind in zip(spans, used)]
    recomputed = tuple(runs.recomputed(i, choice) for (i, _), choice in zip(spans, choices))
    return Division(
        partition=Partition(
            name=name, stages=tuple(graph.names[i:j] for i, j in spans),
            recomputed=recomputed if any(recomputed) else (),
        ),
        order=tuple(free[kind].pop(0) for kind in used),
        seconds=tuple(float(tables[kind][0][span]) for span, kind in zip(spans, used)),
        memory_bytes=tuple(runs.memory(i, j, choice) for (i, j), choice in zip(spans, choices)),
    )


def any_order_is_searchable(layers: int, workers: Sequence[Worker]) -> bool:
    """Whether `divide` can find the best order of these ranks for a graph of so many layers."""
    return _cells(layers, [workers.count(worker) for worker in dict.fromkeys(workers)]) <= MAX_CELLS


def _cells(layers: int, counts: Sequence[int]) -> float:
    return float(np.prod([float(count + 1) for count in counts])) * len(counts) * layers**2


_Step = tuple[_Counts, list[tuple[_Counts, int]]]
"""A set of ranks used (counts by kind), and from which smaller sets it comes by adding a rank of which kind."""


def _in_order(kind_of: Sequence[int]) -> Iterator[_Step]:
    kinds = max(kind_of) + 1
    used = (0,) * kinds
    for kind in kind_of:
        after = tuple(count + (index == kind) for index, count in enumerate(used))
        yield after, [(used, kind)]
        used = after


def _in_any_order(
    kind_of: Sequence[int], runs: RunCosts, tables: Sequence[tuple[NDArray[np.float64], NDArray[np.int64]]]
) -> Iterator[_Step]:
    totals = [kind_of.count(kind) for kind in range(len(tables))]
    if _cells(runs.size, totals) > MAX_CELLS:
        raise UsageError(
            f"got {len(kind_of)} ranks of {len(tables)} kinds for {runs.size} layers: too many orders of the ranks to "
            "search; give the ranks in order, or describe equal ones equally"
        )
    for used in sorted(product(*(range(total + 1) for total in totals)), key=sum):
        before = [
            (tuple(count - (index == kind) for index, count in enumerate(used)), kind)
            for kind in range(len(tables)) if used[kind]
        ]
        if before:
            yield used, before


_Found = tuple[list[int], list[int]] | None
"""The cuts of a division and the kind of rank of every stage; None when there is none."""


def _slowest(found: _Found, tables: Sequence[NDArray[np.float64]]) -> float:
    if found is None:
        return np.inf
    return max(float(tables[kind][span]) for span, kind in zip(pairwise(found[0]), found[1]))


def _solve(
    path: Sequence[_Step], runs: RunCosts, tables: Sequence[NDArray[np.float64]], *, at_most: float = np.inf
) -> _Found:
    """The best division, if it takes `at_most` so long: only stages that do are looked at."""
    final = path[-1][0]
    empty = np.full(runs.size + 1, np.inf)
    empty[0] = 0.0
    best: dict[_Counts, NDArray[np.float64]] = {(0,) * len(final): empty}
    origin: dict[_Counts, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    bands = [_band(table[: runs.last + 1], at_most) for table in tables]
    ends = np.arange(runs.size + 1)
    for used, before in path:
        allowed = ends == runs.size if used == final else ends <= runs.last
        least = np.full(runs.size + 1, np.inf)
        start, kind_of = np.zeros(runs.size + 1, dtype=np.int64), np.zeros(runs.size + 1, dtype=np.int64)
        for smaller, kind in before:
            begins, times = bands[kind]
            slowest = np.maximum(best[smaller][begins], times)
            first = slowest.argmin(axis=1)
            value = slowest[ends, first]
            better = allowed & (value < least)
            least[better], start[better], kind_of[better] = value[better], begins[ends, first][better], kind
        best[used], origin[used] = least, (start, kind_of)
    if not np.isfinite(best[final][runs.size]):
        return None
    cuts, kinds, used = [runs.size], [], final
    while any(used):
        start, kind_of = origin[used]
        kind = int(kind_of[cuts[-1]])
        cuts.append(int(start[cuts[-1]]))
        kinds.append(kind)
        used = tuple(count - (index == kind) for index, count in enumerate(used))
    return cuts[::-1], kinds[::-1]


def _band(table: NDArray[np.float64], at_most: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Per end of a stage, where it may begin, `[end, k]`, and how long it takes then (infinite where there are fewer).

    Only stages of finite time up to `at_most` count; memory runs along `k`, as the minima do.
    """
    fits = np.isfinite(table) & (table <= at_most * (1 + 1e-12))
    last = len(table) - 1
    first = fits.argmax(axis=0)
    count = np.where(fits.any(axis=0), last - fits[::-1].argmax(axis=0) - first + 1, 0)
    offsets = np.arange(max(1, int(count.max())))
    begins = np.minimum(first[:, None] + offsets, last)
    times = np.where(offsets < count[:, None], table[begins, np.arange(table.shape[1])[:, None]], np.inf)
    return begins, times


def _too_little(graph: LayerGraph, runs: RunCosts, workers: Sequence[Worker]) -> str:
    """What the ranks have, and what as many equal ranks would need."""
    needed = runs.least_memory.astype(float)
    needed[np.tril_indices(len(needed))] = np.inf
    found = _solve(list(_in_order([0] * len(workers))), runs, [needed])
    assert found is not None, "there are layers enough"
    least = max(int(needed[span]) for span in pairwise(found[0]))
    limits = ", ".join("any" if w.memory_bytes is None else f"{w.memory_bytes / 1e9:.3g}" for w in workers)
    return (
        f"{len(graph.layers)} layers in {len(workers)} contiguous stages do not fit into memories of {limits} GB; "
        f"ranks of {least / 1e9:.3g} GB each would do, or more ranks"
    )
