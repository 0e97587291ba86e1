"""Time and memory of every run of layers as a stage on a given rank, cheap shared layers sent or recomputed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..ir import LayerGraph, Link, UsageError
from .crossing import bytes_in
from .layer_times import check_costs

__all__ = ["MAX_SHARED", "RunCosts", "Worker", "closed_sets", "shared_layers"]

MAX_SHARED = 6
"""Layers that may be chosen to be recomputed, each or not: all `2**MAX_SHARED` choices are weighed for every run."""
_AUTOMATIC = 4
_SHARE = 0.02
"""Share of the denoiser's time that a layer and all it depends on may take to be chosen automatically."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A rank as the partitioner sees it."""

    speed: float = 1.0
    """Relative to the device that the layers were timed on."""
    memory_bytes: int | None = None
    """What parameters and activations of its stage may take up; None: any amount."""
    link: Link | None = None
    """Over which it receives; None: for free. Only latency and bandwidth count."""

    def __post_init__(self) -> None:
        if not self.speed > 0:
            raise UsageError(f"got speed {self.speed:g}; it is relative to the profiled device and above 0")


def shared_layers(graph: LayerGraph, costs: Sequence[float]) -> tuple[str, ...]:
    """Layers worth thinking of recomputing: cheap with all that they depend on, and read far and wide.

    Those whose ancestors and themselves take at most 2 % of the time and whose values several layers read; of these
    the four with the most bytes to send (each value once per reader), in layer order.
    """
    seconds = check_costs(graph, costs)
    ancestors = _ancestors(graph)
    total = float(seconds.sum())
    weight = dict.fromkeys(range(len(seconds)), 0)
    position = {name: index for index, name in enumerate(graph.names)}
    for value in graph.values:
        if len(value.consumers) > 1:
            weight[position[value.producer]] += value.nbytes * len(value.consumers)
    cheap = [
        layer for layer, closure in enumerate(ancestors)
        if weight[layer] and graph.names[layer] != graph.output
        and float(seconds[sorted(closure)].sum()) <= _SHARE * total
    ]
    chosen = sorted(cheap, key=lambda layer: (-weight[layer], layer))[:_AUTOMATIC]
    return tuple(graph.names[layer] for layer in sorted(chosen))


class RunCosts:
    """Tables over runs `[i, j)` of the layer order, as arrays indexed by the two borders.

    A run receives every value that it reads and does not compute, each once, and may instead evaluate layers before it
    again: any set that holds, with a layer, all that the layer depends on, so that nothing is received for it. Its
    memory is its parameters, those of what it recomputes, room for everything that comes from outside, and the
    largest sum of values that are alive together, per branch evaluated at a time.
    """

    def __init__(
        self, graph: LayerGraph, costs: Sequence[float], *, recompute: Iterable[str] = (), overlap: bool = False,
        branches: int = 1,
    ) -> None:
        """
        Args:
            graph, costs: layers and their seconds.
            recompute: layers that may be recomputed (with all that they depend on).
            overlap: a stage takes the longer of computing and receiving instead of their sum.
            branches: branches evaluated together, for the memory of activations.

        Raises:
            UsageError: `costs` or `recompute` do not fit the graph.
        """
        self.seconds, self.overlap = check_costs(graph, costs), overlap
        size = len(self.seconds)
        self.size, self.names, self.last = size, graph.names, graph.names.index(graph.output)
        self.choices = closed_sets(graph, tuple(recompute))
        self._begin = _prefix(self.seconds)
        parameters = np.array([layer.parameter_bytes for layer in graph.layers], dtype=np.int64)
        self._again_s = [_prefix(np.where(_mask(chosen, size), self.seconds, 0)) for chosen in self.choices]
        again_bytes = [_prefix(np.where(_mask(chosen, size), parameters, 0)) for chosen in self.choices]
        self.received = [bytes_in(graph, {graph.names[k] for k in chosen}) for chosen in self.choices]
        own = _prefix(parameters)
        bare = own[None, :] - own[:, None] + branches * (self.received[0] + _peak(graph))
        self._memory = [bare + extra[:, None] for extra in again_bytes]
        start, end = np.indices(bare.shape)
        self._possible = start < end

    def table(self, worker: Worker) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """`[i, j]`: the least seconds of the run on `worker`, infinite where it does not fit; and by which choice."""
        best = np.full(self._possible.shape, np.inf)
        by = np.zeros(best.shape, dtype=np.int64)
        for index, (again, received, memory) in enumerate(zip(self._again_s, self.received, self._memory)):
            compute = (self._begin[None, :] - self._begin[:, None] + again[:, None]) / worker.speed
            moving = np.zeros(received.shape)
            if worker.link is not None:
                moving = np.where(received > 0, worker.link.latency_s + received / worker.link.bytes_per_s, 0.0)
            seconds = np.maximum(compute, moving) if self.overlap else compute + moving
            fits = self._possible if worker.memory_bytes is None else self._possible & (memory <= worker.memory_bytes)
            better = fits & (seconds < best)
            best[better], by[better] = seconds[better], index
        return best, by

    def memory(self, i: int, j: int, choice: int = 0) -> int:
        """Bytes that the run takes up."""
        return int(self._memory[choice][i, j])

    @property
    def least_memory(self) -> NDArray[np.int64]:
        """`[i, j]`: bytes of the run when it recomputes nothing."""
        return self._memory[0]

    def recomputed(self, i: int, choice: int) -> tuple[str, ...]:
        """The layers before `i` that a run from `i` evaluates again."""
        return tuple(self.names[layer] for layer in sorted(self.choices[choice]) if layer < i)


def closed_sets(graph: LayerGraph, heads: Sequence[str]) -> list[frozenset[int]]:
    """Layers by position: the empty set first, then every union of `heads` with all that they depend on.

    Raises:
        UsageError: a head is no layer of the graph, or its output, or there are more than `MAX_SHARED`.
    """
    position = {name: index for index, name in enumerate(graph.names)}
    unknown = [name for name in heads if name not in position or name == graph.output]
    if unknown or len(heads) > MAX_SHARED:
        raise UsageError(
            f"got {len(heads)} layers to recompute, {unknown[:3] or 'too many'}; give at most {MAX_SHARED} layers of "
            f"the graph other than its output {graph.output!r}"
        )
    closures = _ancestors(graph)
    sets = [
        frozenset().union(*(closures[position[name]] for name in some))
        for count in range(len(heads) + 1) for some in combinations(heads, count)
    ]
    return list(dict.fromkeys(sets))


def _ancestors(graph: LayerGraph) -> list[frozenset[int]]:
    """Per layer, itself and every layer it depends on."""
    position = {name: index for index, name in enumerate(graph.names)}
    producers: list[set[int]] = [set() for _ in graph.names]
    for value in graph.values:
        for consumer in value.consumers:
            producers[position[consumer]].add(position[value.producer])
    closures: list[frozenset[int]] = []
    for layer, before in enumerate(producers):
        closures.append(frozenset({layer}).union(*(closures[k] for k in before)))
    return closures


def _peak(graph: LayerGraph) -> NDArray[np.int64]:
    """`[i, j]`: largest sum of the values produced in the run that are alive together; O(layers x values + layers^2).

    A value lives from its producer to its last reader, wherever that is: one that leaves the run stays to its end.
    """
    size = len(graph.layers)
    position = {name: index for index, name in enumerate(graph.names)}
    lives = np.array([
        (position[v.producer], max(position[name] for name in v.consumers), v.nbytes)
        for v in graph.values if v.consumers
    ], dtype=np.int64).reshape(-1, 3)
    peak = np.zeros((size + 1, size + 1), dtype=np.int64)
    for i in range(size):
        change = np.zeros(size + 1, dtype=np.int64)
        inside = lives[lives[:, 0] >= i]
        np.add.at(change, inside[:, 0], inside[:, 2])
        np.subtract.at(change, inside[:, 1] + 1, inside[:, 2])
        peak[i, i + 1 :] = np.maximum.accumulate(change.cumsum()[i:size])
    return peak


def _mask(layers: frozenset[int], size: int) -> NDArray[np.bool_]:
    mask = np.zeros(size, dtype=bool)
    mask[sorted(layers)] = True
    return mask


def _prefix(values: NDArray) -> NDArray:
    return np.concatenate([np.zeros(1, dtype=values.dtype), np.cumsum(values)])
