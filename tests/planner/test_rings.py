"""Ring partitions against brute force, and on the shape they are meant for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.ir import InputError, LayerGraph, UsageError
from hybridiff_compiler.planner import Worker, nested, rings
from hybridiff_compiler.planner.layer_times import inner_runs

from .graphs import graph_of, graphs, unet_like
from .test_divide import with_parameters

Chain = tuple[tuple[int, int], ...]
TOLERANCE = 1 + 1e-6


def chains(size: int, stages: int) -> Iterator[Chain]:
    """Every sequence of runs, each properly inside the one before, from all layers inwards."""

    @cache
    def inside(i: int, j: int, count: int) -> tuple[Chain, ...]:
        if count == 0:
            return ((),)
        return tuple(
            ((a, b), *rest) for a in range(i, j) for b in range(a + 1, j + 1) if (a, b) != (i, j)
            for rest in inside(a, b, count - 1)
        )

    yield from inside(0, size, stages - 1)


def brute_force(
    graph: LayerGraph, costs: list[int], workers: list[Worker], slack: float
) -> tuple[float, int] | None:
    """Slowest stage and bytes over the borders, as `rings` documents them."""
    names, size = graph.names, len(graph.layers)
    parameters = [layer.parameter_bytes for layer in graph.layers]
    for allowed in inner_runs(graph):
        found = []
        for chain in chains(size, len(workers)):
            if not all(allowed[run] for run in chain):
                continue
            spans = [(0, size), *chain]
            sets = [set(range(*outer)) - set(range(*inner)) for outer, inner in zip(spans, [*chain, (0, 0)])]
            times, fits = [], True
            for stage, worker in zip(sets, reversed(workers)):
                times.append(sum(costs[layer] for layer in stage) / worker.speed)
                fits &= worker.memory_bytes is None or sum(parameters[k] for k in stage) <= worker.memory_bytes
            border = 0
            for run in chain:
                inner = set(names[slice(*run)])
                for value in graph.values:
                    border += value.nbytes * (value.producer in inner and not inner.issuperset(value.consumers))
                    border += value.nbytes * (value.producer not in inner and not inner.isdisjoint(value.consumers))
            if fits:
                found.append((max(times), border))
        if found:
            least = min(slowest for slowest, _ in found)
            return least, min(border for slowest, border in found if slowest <= least * (1 + slack) * TOLERANCE)
    return None


def judge(graph: LayerGraph, costs: list[int], workers: list[Worker], stages: tuple) -> tuple[float, int]:
    seconds = dict(zip(graph.names, costs))
    slowest = max(sum(seconds[name] for name in stage) / w.speed for stage, w in zip(stages, workers))
    border, inner = 0, set()
    for stage in stages[:-1]:
        inner |= set(stage)
        for v in graph.values:
            border += v.nbytes * (v.producer in inner and not inner.issuperset(v.consumers))
            border += v.nbytes * (v.producer not in inner and not inner.isdisjoint(v.consumers))
    return slowest, border


@settings(max_examples=300, deadline=None)
@given(st.data(), graphs(max_layers=7), st.integers(2, 4), st.sampled_from([0.0, 0.3]), st.booleans())
def test_rings_are_optimal(
    data: st.DataObject, graph: LayerGraph, stages: int, slack: float, unequal: bool
) -> None:
    size = len(graph.layers)
    costs = data.draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))
    graph = with_parameters(graph, data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size)))
    worker = st.builds(Worker, speed=st.sampled_from([0.5, 1.0, 2.0]), memory_bytes=st.none() | st.integers(5, 40))
    workers = data.draw(st.lists(worker, min_size=stages, max_size=stages)) if unequal else [Worker()] * stages
    expected = brute_force(graph, costs, workers, slack) if stages <= size else None
    if expected is None:
        with pytest.raises(InputError, match="rings"):
            rings(graph, costs, stages, workers=workers, slack=slack)
        return
    found = rings(graph, costs, stages, workers=workers, slack=slack)
    found.check_covers(graph)
    slowest, border = judge(graph, costs, workers, found.stages)
    least, fewest = expected
    assert slowest <= least * (1 + slack) * TOLERANCE
    assert border == fewest
    if math.isclose(slack, 0):
        assert slowest == pytest.approx(least)


def test_two_rings_are_as_balanced_as_the_nested_split() -> None:
    graph = unet_like(12)
    costs = [1 + (k * 7) % 5 for k in range(len(graph.layers))]
    two = judge(graph, costs, [Worker()] * 2, rings(graph, costs, 2).stages)
    assert two == judge(graph, costs, [Worker()] * 2, nested(graph, costs).stages)


def test_rings_of_a_unet_hold_both_ends_of_its_skips() -> None:
    graph = unet_like(16)
    stages = rings(graph, [1.0] * len(graph.layers), 4, slack=0.2).stages
    position = {name: index for index, name in enumerate(graph.names)}
    for inner, outer in pairwise(stages):
        assert min(map(position.__getitem__, outer)) < min(map(position.__getitem__, inner))
        assert max(map(position.__getitem__, outer)) > max(map(position.__getitem__, inner))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: rings(g, [1.0] * 4, 1), "got 1 rings"),
        (lambda g: rings(g, [1.0] * 4, 3, workers=[Worker()]), "got 1 workers for 3 rings"),
        (lambda g: rings(g, [1.0] * 3, 2), "got costs of 3 layers"),
        (lambda g: rings(g, [1.0] * 4, 2, slack=-1), "got slack -1"),
    ],
)
def test_wrong_arguments_are_usage_errors(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(graph_of(4, [(0, (1,), 1), (1, (2,), 1), (2, (3,), 1)]))
