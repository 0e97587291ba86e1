"""What the stages of a given partition recompute, against trying everything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.ir import LayerGraph, Link, Partition, UsageError
from hybridiff_compiler.planner import Worker, candidate_partitions, recompute_shared

from .graphs import graph_of, graphs, unet_like
from .test_divide import closed_sets, stage_time


@settings(max_examples=200, deadline=None)
@given(st.data(), graphs(max_layers=6), st.booleans(), st.sampled_from([1, 4]))
def test_every_stage_recomputes_what_is_best_for_it(
    data: st.DataObject, graph: LayerGraph, overlap: bool, rate: int
) -> None:
    costs = data.draw(st.lists(st.integers(0, 4), min_size=len(graph.layers), max_size=len(graph.layers)))
    owner = data.draw(st.lists(st.integers(0, 1), min_size=len(graph.layers), max_size=len(graph.layers)))
    stages = [tuple(n for n, k in zip(graph.names, owner) if k == stage) for stage in (0, 1)]
    stages = sorted((stage for stage in stages if stage), key=lambda stage: graph.output in stage)
    link = Link(source=0, target=1, latency_s=1, bytes_per_s=rate)
    heads = [name for name in graph.names if name != graph.output]
    found = recompute_shared(
        graph, costs, Partition(name="p", stages=tuple(stages)), link, overlap=overlap, recompute=heads
    )
    found.check_covers(graph)
    assert found.stages == tuple(stages)
    seconds, worker = dict(zip(graph.names, costs)), Worker(link=link)
    for index, stage in enumerate(found.stages):
        own = set(stage)
        again = set(found.recomputed[index]) if found.recomputed else set()
        times = [
            stage_time(graph, seconds, own, choice - own, worker, overlap)
            for choice in closed_sets(graph, set(graph.names))
        ]
        assert stage_time(graph, seconds, own, again, worker, overlap) == pytest.approx(min(times))


def test_candidates_for_a_slow_link_recompute_the_time_embedding() -> None:
    graph = unet_like(30)
    table = [v.model_copy(update={"nbytes": 4000}) if v.producer == "l0" else v for v in graph.values]
    graph = graph.model_copy(update={"values": tuple(table)})
    costs = [0.1, *([1.0] * (len(graph.layers) - 1))]
    slow = Link(source=0, target=1, latency_s=0.0, bytes_per_s=1000.0)
    for partition in candidate_partitions(graph, costs, (2, 4), link=slow):
        owner = next(index for index, stage in enumerate(partition.stages) if "l0" in stage)
        assert partition.recomputed == tuple(
            () if index == owner else ("l0",) for index in range(len(partition.stages))
        )
    assert all(partition.recomputed == () for partition in candidate_partitions(graph, costs, (2, 4)))


def test_unknown_layers_are_refused() -> None:
    graph = graph_of(2, [(0, (1,), 1)])
    link = Link(source=0, target=1, latency_s=0, bytes_per_s=1)
    with pytest.raises(UsageError, match="layers to recompute"):
        recompute_shared(graph, [1, 1], Partition.whole(graph), link, recompute=["nothing"])
