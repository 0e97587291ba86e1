"""Bytes that cross the borders of every run of layers, and what stays alive without it, all runs at once.

A run `[i, j)` is a contiguous part of the layer order. Layers are listed in execution order, so a value enters a run
from before it and leaves to after it. Each value counts once per receiving stage, however many layers there read it,
unless its producer is among the layers that the receiving side recomputes (time embedding, rotary table).

Where it is known how much values change from step to step, bytes that are read a step old are weighed by that: a value
that barely moves loses little.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from ..ir import LayerGraph, Partition, UsageError

__all__ = ["bytes_in", "bytes_out", "change_weights", "live_seconds", "lost_across", "stage_bytes"]

_UNIT = 1_000_000
"""What a byte that changes altogether in a step weighs; one that only has to travel weighs 1. Whole numbers keep sums
exact, so that equals are equal."""


def change_weights(graph: LayerGraph, change: Mapping[str, float]) -> dict[str, int]:
    """What every value weighs that is read one step old: its bytes times its relative change, in millionths, plus its
    bytes (so that of two cuts that lose equally much the smaller one is lighter).

    Args:
        graph: the layers.
        change: relative change per step of every value (`Redundancy.mean`).

    Raises:
        UsageError: a value is missing, or its change is negative or not finite.
    """
    missing = [value.name for value in graph.values if value.name not in change]
    if missing:
        raise UsageError(
            f"got the change of {len(graph.values) - len(missing)} values, none of {missing[:3]}; give that of all "
            f"{len(graph.values)} values of the graph, or of none"
        )
    wrong = {value.name: change[value.name] for value in graph.values if not 0 <= change[value.name] < math.inf}
    if wrong:
        raise UsageError(f"got changes {dict(list(wrong.items())[:3])}; a relative change is 0 or more, and finite")
    return {value.name: value.nbytes * round(_UNIT * change[value.name]) + value.nbytes for value in graph.values}


def lost_across(graph: LayerGraph, change: Mapping[str, float] | None) -> NDArray[np.int64]:
    """`[i, j]`: what a border around the run `[i, j)` costs an image, to compare borders of one graph.

    With `change`, values that leave the run weigh as in `change_weights`: what makes the estimate lies outside, and it
    reads them one step old. Values that enter the run reach the estimate a step later through these, so they weigh
    their bytes alone. Without it, the bytes of all that crosses. O(consumers + layers^2).
    """
    return bytes_in(graph) + bytes_out(graph, None if change is None else change_weights(graph, change))


def bytes_in(
    graph: LayerGraph, recomputed: Collection[str] = (), weights: Mapping[str, int] | None = None
) -> NDArray[np.int64]:
    """`[i, j]`: bytes of the values produced before `i`, by no layer in `recomputed`, and read inside `[i, j)`.

    With `weights`, by value name, these are summed in place of the bytes.

    A value is counted for the run when the first of its consumers at or after `i` lies before `j`; every consumer is
    that first one for a whole range of `i`, so two sums over a difference array give all entries in
    O(consumers + layers^2).
    """
    size = len(graph.layers)
    position = {name: index for index, name in enumerate(graph.names)}
    table = np.zeros((size + 2, size + 1), dtype=np.int64)
    for value in graph.values:
        if value.producer in recomputed:
            continue
        before, weight = position[value.producer], value.nbytes if weights is None else weights[value.name]
        for consumer in sorted({position[name] for name in value.consumers}):
            table[before + 1, consumer + 1] += weight
            table[consumer + 1, consumer + 1] -= weight
            before = consumer
    return table.cumsum(axis=0).cumsum(axis=1)[: size + 1]


def bytes_out(graph: LayerGraph, weights: Mapping[str, int] | None = None) -> NDArray[np.int64]:
    """`[i, j]`: bytes (or `weights`) of the values produced inside `[i, j)` and read at or after `j`.

    O(values + layers^2).
    """
    size = len(graph.layers)
    position = {name: index for index, name in enumerate(graph.names)}
    table = np.zeros((size + 1, size + 2), dtype=np.int64)
    for value in graph.values:
        if value.consumers:
            producer, weight = position[value.producer], value.nbytes if weights is None else weights[value.name]
            table[producer, producer + 1] += weight
            table[producer, max(position[name] for name in value.consumers) + 1] -= weight
    return table.cumsum(axis=1)[::-1].cumsum(axis=0)[::-1, : size + 1]


def stage_bytes(graph: LayerGraph, partition: Partition) -> dict[tuple[int, int], int]:
    """`(source, target)` -> bytes that stage `target` takes from stage `source`, where there are any.

    What a stage recomputes is taken from nobody. O(consumers).
    """
    owner = {name: stage for stage, names in enumerate(partition.stages) for name in names}
    readers: dict[str, list[int]] = {name: [stage] for name, stage in owner.items()}
    for stage, names in enumerate(partition.recomputed):
        for name in names:
            readers[name].append(stage)
    between: dict[tuple[int, int], int] = {}
    for value in graph.values:
        source = owner[value.producer]
        for target in {stage for name in value.consumers for stage in readers[name]}.difference(
            readers[value.producer]
        ):
            between[source, target] = between.get((source, target), 0) + value.nbytes
    return between


def live_seconds(graph: LayerGraph, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[i, j]`: time of the layers outside `[i, j)` whose results reach the output without passing through the run.

    With the run's results reused, only these layers make this step's estimate differ from the last one. A layer before
    the run stays live until the run's end passes the last layer from which its way to the output goes on, so one number
    per layer and start says it for every end: backwards over the layers, O(edges x layers).
    """
    size = len(graph.layers)
    position = {name: index for index, name in enumerate(graph.names)}
    consumers: list[set[int]] = [set() for _ in range(size)]
    for value in graph.values:
        consumers[position[value.producer]].update(position[name] for name in value.consumers)
    start = np.arange(size + 1)
    reaches = np.zeros(size, dtype=bool)
    farthest = np.full((size, size + 1), -1)  # of layers before the start: the largest end at which they are live
    for layer in reversed(range(size)):
        reaches[layer] = graph.names[layer] == graph.output or any(reaches[c] for c in consumers[layer])
        if graph.names[layer] == graph.output:
            farthest[layer] = size
        for consumer in consumers[layer]:
            beyond = consumer if reaches[consumer] else -1
            np.maximum(farthest[layer], np.where(start > consumer, farthest[consumer], beyond), out=farthest[layer])
    after = np.concatenate([np.cumsum((seconds * reaches)[::-1])[::-1], [0.0]])
    total = np.tile(after, (size + 1, 1))
    for i in range(1, size + 1):
        ends = farthest[:i, i]
        until = np.bincount(ends[ends >= 0], weights=seconds[:i][ends >= 0], minlength=size + 1)
        total[i] += np.cumsum(until[::-1])[::-1]
    return total
