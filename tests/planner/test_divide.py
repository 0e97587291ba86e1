"""The partitioner for unequal ranks against brute force and against an independent MILP."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from hybridiff_compiler.ir import InputError, LayerGraph, Link, UsageError
from hybridiff_compiler.planner import Worker, candidate_partitions, divide, linear, shared_layers

from .graphs import graph_of, graphs, unet_like

links = st.none() | st.builds(
    Link, source=st.just(0), target=st.just(1), latency_s=st.integers(0, 2), bytes_per_s=st.sampled_from([1, 2, 8])
)
some_workers = st.lists(
    st.builds(
        Worker, speed=st.sampled_from([0.5, 1.0, 2.0]), memory_bytes=st.none() | st.integers(1, 60), link=links
    ),
    min_size=1, max_size=3,
)


def with_parameters(graph: LayerGraph, nbytes: list[int]) -> LayerGraph:
    layers = tuple(layer.model_copy(update={"parameter_bytes": b}) for layer, b in zip(graph.layers, nbytes))
    return graph.model_copy(update={"layers": layers})


def ancestors(graph: LayerGraph, name: str) -> set[str]:
    above = {v.producer for v in graph.values if name in v.consumers}
    return {name}.union(*(ancestors(graph, other) for other in above))


def closed_sets(graph: LayerGraph, before: set[str]) -> list[set[str]]:
    """Every set of earlier layers that holds all that its members depend on, by trying all sets."""
    names = sorted(before - {graph.output})
    every = (set(some) for size in range(len(names) + 1) for some in itertools.combinations(names, size))
    return [some for some in every if all(ancestors(graph, name) <= some for name in some)]


def stage_time(
    graph: LayerGraph, costs: dict[str, int], stage: set[str], again: set[str], worker: Worker, overlap: bool
) -> float:
    moved = sum(
        v.nbytes for v in graph.values if v.producer not in stage | again and (stage & set(v.consumers))
    )
    compute = sum(costs[name] for name in stage | again) / worker.speed
    moving = worker.link.latency_s + moved / worker.link.bytes_per_s if worker.link and moved else 0.0
    return max(compute, moving) if overlap else compute + moving


def stage_memory(graph: LayerGraph, order: list[str], stage: set[str], again: set[str]) -> int:
    size = {layer.name: layer.parameter_bytes for layer in graph.layers}
    received = sum(v.nbytes for v in graph.values if v.producer not in stage and stage & set(v.consumers))
    alive = [
        sum(
            v.nbytes for v in graph.values if v.consumers and v.producer in stage
            and order.index(v.producer) <= at <= max(order.index(c) for c in v.consumers)
        )
        for at, name in enumerate(order) if name in stage
    ]
    return sum(size[name] for name in stage | again) + received + max(alive)


def brute_force(
    graph: LayerGraph, costs: list[int], workers: list[Worker], overlap: bool, any_order: bool, recompute: bool
) -> float:
    order, last = list(graph.names), graph.names.index(graph.output)
    seconds = dict(zip(order, costs))
    best = math.inf
    for cut in itertools.combinations(range(1, last + 1), len(workers) - 1):
        spans = list(zip((0, *cut), (*cut, len(order))))
        for ranks in itertools.permutations(workers) if any_order else [workers]:
            slowest = 0.0
            for (i, j), worker in zip(spans, ranks):
                stage = set(order[i:j])
                choices = closed_sets(graph, set(order[:i])) if recompute else [set()]
                limit = math.inf if worker.memory_bytes is None else worker.memory_bytes
                slowest = max(slowest, min(
                    (stage_time(graph, seconds, stage, again, worker, overlap) for again in choices
                     if stage_memory(graph, order, stage, again) <= limit), default=math.inf,
                ))
            best = min(best, slowest)
    return best


def check(
    graph: LayerGraph, costs: list[int], workers: list[Worker], overlap: bool, any_order: bool, recompute: bool
) -> None:
    heads = [name for name in graph.names if name != graph.output] if recompute else []
    expected = brute_force(graph, costs, workers, overlap, any_order, recompute)
    arguments = {"overlap": overlap, "any_order": any_order, "recompute": heads}
    if math.isinf(expected):
        with pytest.raises(InputError, match="do not fit into memories of"):
            divide(graph, costs, workers, **arguments)
        return
    found = divide(graph, costs, workers, **arguments)
    assert found.slowest_s == pytest.approx(expected)
    # What it says about itself is true.
    found.partition.check_covers(graph)
    seconds, order = dict(zip(graph.names, costs)), list(graph.names)
    assert [name for stage in found.partition.stages for name in stage] == order
    assert sorted(found.order) == list(range(len(workers)))
    assert any_order or found.order == tuple(range(len(workers)))
    for index, (stage, rank) in enumerate(zip(found.partition.stages, found.order)):
        again = set(found.partition.recomputed[index]) if found.partition.recomputed else set()
        assert found.seconds[index] == pytest.approx(
            stage_time(graph, seconds, set(stage), again, workers[rank], overlap)
        )
        assert found.memory_bytes[index] == stage_memory(graph, order, set(stage), again)


@settings(max_examples=1000, deadline=None)
@given(st.data(), graphs(max_layers=6), some_workers, st.booleans(), st.booleans())
def test_divide_is_optimal(
    data: st.DataObject, graph: LayerGraph, workers: list[Worker], overlap: bool, any_order: bool
) -> None:
    size = len(graph.layers)
    workers = workers[: graph.names.index(graph.output) + 1]
    costs = data.draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))
    graph = with_parameters(graph, data.draw(st.lists(st.integers(0, 20), min_size=size, max_size=size)))
    check(graph, costs, workers, overlap, any_order, recompute=False)


@settings(max_examples=200, deadline=None)
@given(st.data(), graphs(max_layers=6), some_workers, st.booleans(), st.booleans())
def test_divide_with_recomputation_is_optimal(
    data: st.DataObject, graph: LayerGraph, workers: list[Worker], overlap: bool, any_order: bool
) -> None:
    size = len(graph.layers)
    workers = workers[: graph.names.index(graph.output) + 1]
    costs = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    graph = with_parameters(graph, data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)))
    check(graph, costs, workers, overlap, any_order, recompute=True)


class Model:
    """A mixed integer program put together by name."""

    def __init__(self) -> None:
        self.index: dict[tuple, int] = {}
        self.whole: list[bool] = []
        self.rows: list[tuple[dict[int, float], float]] = []

    def var(self, *name: object, whole: bool = True) -> int:
        if name not in self.index:
            self.index[name] = len(self.index)
            self.whole.append(whole)
        return self.index[name]

    def at_most(self, terms: dict[int, float], limit: float) -> None:
        self.rows.append((terms, limit))

    def solve(self) -> float | None:
        matrix = np.zeros((len(self.rows), len(self.index)))
        for row, (terms, _) in enumerate(self.rows):
            for column, factor in terms.items():
                matrix[row, column] += factor
        objective = np.zeros(len(self.index))
        objective[self.index["T",]] = 1
        whole = np.array(self.whole)
        upper = np.where(whole, 1.0, np.inf)
        result = milp(
            objective, integrality=whole.astype(int), bounds=Bounds(0, upper),
            constraints=LinearConstraint(matrix, ub=[limit for _, limit in self.rows]),
            options={"mip_rel_gap": 0},
        )
        return float(result.fun) if result.success else None


def milp_optimum(
    graph: LayerGraph, costs: list[float], workers: list[Worker], overlap: bool, heads: tuple[str, ...]
) -> float | None:
    """The same objective stated without runs or dynamic programming: which stage every layer is in, value by value."""
    model, names, stages = Model(), graph.names, range(len(workers))
    position = {name: p for p, name in enumerate(names)}
    size = {layer.name: layer.parameter_bytes for layer in graph.layers}
    big = sum(size.values()) + 2 * sum(v.nbytes for v in graph.values)
    longest = model.var("T", whole=False)
    for name in names:  # `by` is 1 where a layer is in the stage or an earlier one
        for k in stages[1:]:
            model.at_most({model.var("by", name, k - 1): 1, model.var("by", name, k): -1}, 0)
        model.at_most({model.var("by", name, stages[-1]): -1}, -1)
    for before, after in itertools.pairwise(names):
        for k in stages:
            model.at_most({model.var("by", after, k): 1, model.var("by", before, k): -1}, 0)
    if len(workers) > 1:
        model.at_most({model.var("by", graph.output, stages[-2]): 1}, 0)

    def inside(name: str, k: int, factor: float) -> dict[int, float]:
        terms = {model.var("by", name, k): factor}
        return terms | ({model.var("by", name, k - 1): -factor} if k else {})

    allowed = set().union(*(ancestors(graph, head) for head in heads)) if heads else set()
    for k, worker in enumerate(workers):
        model.at_most(add(*(inside(name, k, -1) for name in names)), -1)  # no stage is empty
        for name in allowed if k else ():
            model.at_most({model.var("again", name, k): 1, model.var("by", name, k - 1): -1}, 0)
            for above in ancestors(graph, name):
                model.at_most({model.var("again", name, k): 1, model.var("again", above, k): -1}, 0)
        compute = add(*(inside(name, k, c / worker.speed) for name, c in zip(names, costs)))
        memory = add(*(inside(name, k, size[name]) for name in names))
        for name in allowed if k else ():
            compute = add(compute, {model.var("again", name, k): costs[position[name]] / worker.speed})
            memory = add(memory, {model.var("again", name, k): size[name]})
        moving: dict[int, float] = {}
        for v in graph.values if k else ():
            room, moved = model.var("room", v.name, k), model.var("moved", v.name, k)
            again = {model.var("again", v.producer, k): -1.0} if v.producer in allowed else {}
            for consumer in v.consumers:
                needed = add(inside(consumer, k, 1), {model.var("by", v.producer, k - 1): 1})
                model.at_most(add(needed, {room: -1}), 1)
                model.at_most(add(needed, again, {moved: -1}), 1)
            memory = add(memory, {room: v.nbytes})
            if worker.link is not None:
                moving = add(moving, {moved: v.nbytes / worker.link.bytes_per_s})
                if v.nbytes:
                    model.at_most({moved: 1, model.var("any", k): -1}, 0)
                moving = add(moving, {model.var("any", k): 0})
        if worker.link is not None and k:
            moving = add(moving, {model.var("any", k): worker.link.latency_s})
        for part in ([compute, moving] if overlap else [add(compute, moving)]):
            model.at_most(add(part, {longest: -1}), 0)
        if worker.memory_bytes is not None:
            for at, name in enumerate(names):
                alive = add(*(
                    inside(v.producer, k, v.nbytes) for v in graph.values
                    if v.consumers and position[v.producer] <= at <= max(position[c] for c in v.consumers)
                ))
                model.at_most(add(memory, alive, inside(name, k, big)), worker.memory_bytes + big)
    return model.solve()


def add(*parts: dict[int, float]) -> dict[int, float]:
    total: dict[int, float] = {}
    for part in parts:
        for column, factor in part.items():
            total[column] = total.get(column, 0) + factor
    return total


@pytest.mark.parametrize("seed", range(8))
def test_a_milp_finds_nothing_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, count = 26 + seed % 3, 4
    edges = [(0, tuple(range(2, size, 3)), int(rng.integers(10, 60)))]
    edges += [(i, (i + 1,), int(rng.integers(1, 30))) for i in range(1, size - 1)]
    edges += [(i, (int(rng.integers(i + 2, size)),), int(rng.integers(1, 30))) for i in range(1, size - 3, 3)]
    graph = with_parameters(graph_of(size, edges), rng.integers(1, 40, size).tolist())
    costs = [0.5, *rng.integers(1, 12, size - 1).tolist()]
    speeds = rng.choice([0.5, 1.0, 1.5], count)
    total = sum(layer.parameter_bytes for layer in graph.layers)
    workers = [
        Worker(
            speed=float(speed), memory_bytes=None if seed % 2 else int(total * 0.75) + 60,
            link=Link(source=0, target=1, latency_s=0.5, bytes_per_s=8),
        )
        for speed in speeds
    ]
    overlap, heads = seed % 4 >= 2, ("l0",) if seed >= 4 else ()
    expected = milp_optimum(graph, costs, workers, overlap, heads)
    if expected is None:
        with pytest.raises(InputError, match="do not fit"):
            divide(graph, costs, workers, overlap=overlap, recompute=heads)
        return
    assert divide(graph, costs, workers, overlap=overlap, recompute=heads).slowest_s == pytest.approx(expected)


def test_equal_ranks_without_links_are_the_linear_partition() -> None:
    graph = unet_like(20)
    costs = np.random.default_rng(0).integers(1, 9, len(graph.layers)).tolist()
    found = divide(graph, costs, [Worker()] * 5)
    assert found.partition.stages == linear(graph, costs, 5).stages
    assert found.partition.recomputed == ()


def test_cheap_shared_tensors_are_recomputed_where_sending_them_takes_longer() -> None:
    # A rotary table that every block reads, and a chain.
    size = 60
    edges = [(0, tuple(range(1, size)), 1000), *((i, (i + 1,), 10) for i in range(1, size - 1))]
    graph, costs = graph_of(size, edges), [0.5, *([1.0] * (size - 1))]
    assert shared_layers(graph, costs) == ("l0",)
    slow, fast = (Link(source=0, target=1, latency_s=0.0, bytes_per_s=rate) for rate in (100.0, 1e6))
    found = divide(graph, costs, [Worker(link=slow)] * 3)
    assert found.partition.recomputed == ((), ("l0",), ("l0",))
    assert divide(graph, costs, [Worker(link=fast)] * 3).partition.recomputed == ()
    sent = divide(graph, costs, [Worker(link=slow)] * 3, recompute=False)
    assert found.slowest_s < sent.slowest_s - 6


def test_the_best_order_gives_the_memory_hog_to_the_rank_that_can_hold_it() -> None:
    graph = with_parameters(graph_of(4, [(0, (1,), 1), (1, (2,), 1), (2, (3,), 1)]), [1, 1, 1, 100])
    ranks = [Worker(memory_bytes=200), Worker(memory_bytes=20)]
    with pytest.raises(InputError, match=r"do not fit into memories of .* GB each would do"):
        divide(graph, [1.0] * 4, ranks)
    assert divide(graph, [1.0] * 4, ranks, any_order=True).order == (1, 0)


@settings(max_examples=150, deadline=None)
@given(st.data(), graphs(max_layers=6), st.sampled_from([0.0, 0.2, 1.0]), st.booleans())
def test_steady_cuts_are_preferred(data: st.DataObject, graph: LayerGraph, slack: float, any_order: bool) -> None:
    """Of the divisions in the order found that are fast enough, the one that receives the fewest changed bytes."""
    order, last = list(graph.names), graph.names.index(graph.output)
    costs = data.draw(st.lists(st.integers(1, 8), min_size=len(order), max_size=len(order)))
    count = data.draw(st.integers(1, min(3, last + 1)))
    speeds = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=count, max_size=count))
    steps = st.sampled_from([0.0, 0.03125, 0.25, 2.0])
    change = data.draw(st.fixed_dictionaries({value.name: steps for value in graph.values}))
    workers = [Worker(speed=speed) for speed in speeds]
    arguments = {"any_order": any_order, "recompute": False}
    fastest = divide(graph, costs, workers, **arguments)
    found = divide(graph, costs, workers, slack=slack, change=change, **arguments)
    assert found.order == fastest.order
    found.partition.check_covers(graph)

    def weigh(cut: tuple[int, ...]) -> tuple[float, int]:
        spans = list(zip((0, *cut), (*cut, len(order))))
        slowest = max(sum(costs[i:j]) / workers[rank].speed for (i, j), rank in zip(spans, found.order))
        return slowest, sum(
            value.nbytes + round(1e6 * value.nbytes * change[value.name]) for i, j in spans for value in graph.values
            if value.producer not in order[i:j] and not set(order[i:j]).isdisjoint(value.consumers)
        )

    cuts = [weigh(cut) for cut in itertools.combinations(range(1, last + 1), count - 1)]
    bound = fastest.slowest_s * (1 + slack) + 1e-9
    sizes = [len(stage) for stage in found.partition.stages]
    slowest, loss = weigh(tuple(itertools.accumulate(sizes[:-1])))
    assert slowest == pytest.approx(found.slowest_s)
    assert slowest <= bound
    assert loss == min(loss for time, loss in cuts if time <= bound)


def test_what_is_recomputed_is_not_lost() -> None:
    """A restless value that every stage makes itself pulls no cut."""
    graph = graph_of(6, [(0, (1, 2, 3, 4, 5), 1000), *((i, (i + 1,), 8) for i in range(1, 5))])
    slow = Link(source=0, target=1, latency_s=0, bytes_per_s=1000)
    change = {"v0": 1.0, "v1": 0.5, "v2": 0.5, "v3": 0.1, "v4": 0.5}
    found = divide(
        graph, [0.01, 1.0, 1.0, 1.0, 1.0, 1.0], [Worker(link=slow)] * 2, recompute=("l0",), slack=0.1, change=change,
    )
    assert found.partition.recomputed == ((), ("l0",))
    assert len(found.partition.stages[0]) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: divide(g, [1.0] * 4, []), "got no workers"),
        (lambda g: divide(g, [1.0] * 4, [Worker()] * 5), "at most 4"),
        (lambda g: divide(g, [1.0] * 4, [Worker()], recompute=("l3",)), "other than its output 'l3'"),
        (lambda g: Worker(speed=0), "got speed 0"),
        (
            lambda g: divide(unet_like(40), [1.0] * 82, [Worker(speed=k + 1) for k in range(30)], any_order=True),
            "too many orders of the ranks to search; give the ranks in order",
        ),
    ],
)
def test_wrong_arguments_are_usage_errors(call, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(graph_of(4, [(0, (1,), 1), (1, (2,), 1), (2, (3,), 1)]))
    assert isinstance(caught.value, UsageError) or "at most" in message


def test_candidates_for_unequal_ranks_suit_them() -> None:
    graph = unet_like(40)
    costs = [1.0] * len(graph.layers)
    workers = [Worker(speed=speed) for speed in (0.5, 1.0, 1.5, 1.0)]
    partitions = {p.name: p for p in candidate_partitions(graph, costs, 4, workers=workers)}
    for name, slack in (("linear4", 0.0), ("nested4", 0.05)):
        sizes = sorted(map(len, partitions[name].stages))
        slowest = max(size / speed for size, speed in zip(sizes, sorted(worker.speed for worker in workers)))
        assert slowest <= 21 * (1 + slack)  # 82 layers on ranks of speed 4 together
