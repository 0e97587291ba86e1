"""Which stages of a given partition evaluate cheap shared layers again instead of receiving their values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..ir import LayerGraph, Link, Partition
from .layer_times import check_costs
from .run_costs import closed_sets, shared_layers

__all__ = ["recompute_shared"]


def recompute_shared(
    graph: LayerGraph, costs: Sequence[float], partition: Partition, link: Link, *, overlap: bool = False,
    recompute: Iterable[str] | None = None,
) -> Partition:
    """The same stages, each with the layers that it had better recompute.

    Objective, for every stage by itself: the least of computing (its layers and what it recomputes) and receiving over
    `link` (each value once, from whichever stage), added, or with `overlap` the larger of the two. What is recomputed
    is any union of `recompute` layers with all that they depend on, as in `divide`, which decides it together with
    the cuts; here stages may be any sets of layers (rings). Of equals, what recomputes the least.

    Algorithm: all choices are tried for each stage, O(2^recompute x stages x consumers).

    Args:
        graph, costs: layers and their seconds.
        partition: any; what it recomputes already is decided anew.
        link: over which stages receive. Only latency and bandwidth count.
        overlap: whether receiving hides behind computing.
        recompute: layers that may be recomputed; default `shared_layers`.

    Raises:
        UsageError: `costs` or `recompute` do not fit the graph.
        PlanMismatchError: the partition does not.
    """
    partition.check_covers(graph)
    seconds = dict(zip(graph.names, check_costs(graph, costs).tolist()))
    heads = shared_layers(graph, costs) if recompute is None else tuple(recompute)
    sets = [frozenset(graph.names[layer] for layer in chosen) for chosen in closed_sets(graph, heads)]
    choices = [choice for choice in sets if graph.output not in choice]
    chosen = []
    for stage in partition.stages:
        own = frozenset(stage)
        options = list(dict.fromkeys(choice - own for choice in choices))
        times = []
        for again in options:
            inside = own | again
            nbytes = sum(v.nbytes for v in graph.values if v.producer not in inside and not own.isdisjoint(v.consumers))
            moving = link.latency_s + nbytes / link.bytes_per_s if nbytes else 0.0
            compute = sum(seconds[name] for name in inside)
            times.append(max(compute, moving) if overlap else compute + moving)
        best = options[int(np.argmin(times))]
        chosen.append(tuple(name for name in graph.names if name in best))
    return Partition(
        name=partition.name, stages=partition.stages, recomputed=tuple(chosen) if any(chosen) else ()
    )
