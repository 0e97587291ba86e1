"""Ring partitions against brute force, and on the shape they are meant for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.ir import InputError, LayerGraph, UsageError
from hybridiff_compiler.planner import Worker, nested, rings
from hybridiff_compiler.planner.layer_times import inner_runs

from .graphs import graph_of, graphs, unet_like
from .test_divide import Model, add, with_parameters

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


def border_of(graph: LayerGraph, inner: set[str], change: dict[str, float] | None) -> int:
    """What crosses the border around `inner`, in bytes; with `change`, what leaves it as `lost_across` weighs it."""
    border = 0
    for value in graph.values:
        if value.producer in inner and not inner.issuperset(value.consumers):
            border += value.nbytes + (0 if change is None else round(1e6 * value.nbytes * change[value.name]))
        elif value.producer not in inner and not inner.isdisjoint(value.consumers):
            border += value.nbytes
    return border


def brute_force(
    graph: LayerGraph, costs: list[int], workers: list[Worker], slack: float, change: dict[str, float] | None = None
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
            border = sum(border_of(graph, set(names[slice(*run)]), change) for run in chain)
            if fits:
                found.append((max(times), border))
        if found:
            least = min(slowest for slowest, _ in found)
            return least, min(border for slowest, border in found if slowest <= least * (1 + slack) * TOLERANCE)
    return None


def judge(
    graph: LayerGraph, costs: list[int], workers: list[Worker], stages: tuple, change: dict[str, float] | None = None
) -> tuple[float, int]:
    seconds = dict(zip(graph.names, costs))
    slowest = max(sum(seconds[name] for name in stage) / w.speed for stage, w in zip(stages, workers))
    border, inner = 0, set()
    for stage in stages[:-1]:
        inner |= set(stage)
        border += border_of(graph, inner, change)
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
    steps = st.sampled_from([0.0, 0.03125, 0.25, 2.0])
    change = data.draw(st.none() | st.fixed_dictionaries({value.name: steps for value in graph.values}))
    expected = brute_force(graph, costs, workers, slack, change) if stages <= size else None
    if expected is None:
        with pytest.raises(InputError, match="rings"):
            rings(graph, costs, stages, workers=workers, slack=slack, change=change)
        return
    found = rings(graph, costs, stages, workers=workers, slack=slack, change=change)
    found.check_covers(graph)
    slowest, border = judge(graph, costs, workers, found.stages, change)
    least, fewest = expected
    assert slowest <= least * (1 + slack) * TOLERANCE
    assert border == fewest
    if math.isclose(slack, 0):
        assert slowest == pytest.approx(least)


def milp_optimum(
    graph: LayerGraph, costs: list[int], workers: list[Worker], slack: float
) -> tuple[float, float] | None:
    """The same objective as whole numbers per layer: in how many of the inner runs it lies."""
    fed = {consumer for value in graph.values for consumer in value.consumers}
    inputs = {name for name in graph.names if name not in fed}
    for outside in (inputs | {graph.output}, {graph.output}):
        least = rings_model(graph, costs, workers, outside, None).solve()
        if least is not None:
            fewest = rings_model(graph, costs, workers, outside, least * (1 + slack) * TOLERANCE).solve()
            return None if fewest is None else (least, fewest)
    return None


def rings_model(
    graph: LayerGraph, costs: list[int], workers: list[Worker], outside: set[str], longest: float | None
) -> Model:
    """Minimises the slowest stage, or with `longest` given for it the bytes over the borders."""
    model, names, runs = Model(), graph.names, range(1, len(workers))
    objective = model.var("T", whole=False)

    def inside(run: int, name: str, factor: float = 1.0) -> dict[int, float]:
        return {model.var("in", run, name): factor} if run < len(workers) and name not in outside else {}

    border: dict[int, float] = {}
    for run in runs:
        begins = add(*({model.var("begin", run, name): 1} for name in names))
        model.at_most(begins, 1)  # one run
        for before, name in pairwise((None, *names)):
            earlier = {} if before is None else inside(run, before, -1)
            model.at_most(add(inside(run, name), earlier, {model.var("begin", run, name): -1}), 0)
            if run > 1:
                model.at_most(add(inside(run, name), inside(run - 1, name, -1)), 0)
        for value in graph.values:
            crosses, enters = model.var("leaves", run, value.name), model.var("enters", run, value.name)
            for consumer in value.consumers:
                model.at_most(add(inside(run, value.producer), inside(run, consumer, -1), {crosses: -1}), 0)
                model.at_most(add(inside(run, consumer), inside(run, value.producer, -1), {enters: -1}), 0)
            border = add(border, {crosses: value.nbytes, enters: value.nbytes})
    for number, worker in enumerate(reversed(workers)):  # the outermost stage first
        def stage(weights: dict[str, float], number: int = number) -> tuple[dict[int, float], float]:
            own = add(*(
                add(inside(number, name, weight) if number else {}, inside(number + 1, name, -weight))
                for name, weight in weights.items()
            ))
            return own, 0.0 if number else sum(weights.values())

        terms, constant = stage(dict.fromkeys(names, -1.0))
        model.at_most(terms, -1 - constant)  # no stage is empty
        terms, constant = stage({name: cost / worker.speed for name, cost in zip(names, costs)})
        if longest is None:
            model.at_most(add(terms, {objective: -1}), -constant)
        else:
            model.at_most(terms, longest - constant)
        if worker.memory_bytes is not None:
            terms, constant = stage({layer.name: layer.parameter_bytes for layer in graph.layers})
            model.at_most(terms, worker.memory_bytes - constant)
    if longest is not None:
        model.at_most(add(border, {objective: -1}), 0)
    return model


@pytest.mark.parametrize("seed", range(6))
def test_a_milp_finds_no_better_rings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, stages = 20 + seed % 3, 3 + seed % 2
    edges = [(0, tuple(range(2, size, 3)), int(rng.integers(10, 60)))]
    edges += [(i, (i + 1,), int(rng.integers(1, 30))) for i in range(1, size - 1)]
    edges += [(i, (size - 1 - i,), int(rng.integers(1, 60))) for i in range(1, size // 2 - 1)]
    graph = with_parameters(graph_of(size, edges), rng.integers(1, 40, size).tolist())
    costs = rng.integers(1, 12, size).tolist()
    total = sum(layer.parameter_bytes for layer in graph.layers)
    workers = [
        Worker(speed=float(speed), memory_bytes=None if seed % 2 else int(total * 0.6))
        for speed in rng.choice([0.5, 1.0, 1.5], stages)
    ]
    slack = (0.0, 0.2)[seed // 3]
    expected = milp_optimum(graph, costs, workers, slack)
    assert expected is not None
    slowest, border = judge(graph, costs, workers, rings(graph, costs, stages, workers=workers, slack=slack).stages)
    assert slowest <= expected[0] * (1 + slack) * TOLERANCE
    assert border == pytest.approx(expected[1])


@settings(max_examples=40, deadline=None)
@given(st.data(), graphs(max_layers=6), st.integers(2, 3))
def test_the_milp_agrees_with_brute_force(data: st.DataObject, graph: LayerGraph, stages: int) -> None:
    size = len(graph.layers)
    costs = data.draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))
    workers = data.draw(st.lists(
        st.builds(Worker, speed=st.sampled_from([0.5, 1.0, 2.0])), min_size=stages, max_size=stages
    ))
    expected = brute_force(graph, costs, workers, 0.3) if stages <= size else None
    assert milp_optimum(graph, costs, workers, 0.3) == (None if expected is None else pytest.approx(expected))


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
