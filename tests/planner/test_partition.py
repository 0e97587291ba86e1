"""Partitioners against brute force, and on the shapes they are meant for."""

from __future__ import annotations

import time
from itertools import combinations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.ir import InputError, LayerGraph, Link, Partition, UsageError
from hybridiff_compiler.planner import candidate_partitions, linear, nested, thin
from hybridiff_compiler.planner.crossing import bytes_in, bytes_out

from .graphs import graph_of, graphs, unet_like

links = st.none() | st.builds(
    Link, source=st.just(0), target=st.just(1), latency_s=st.integers(0, 3), bytes_per_s=st.sampled_from([1, 2, 8])
)


def costs_for(graph: LayerGraph) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 8), min_size=len(graph.layers), max_size=len(graph.layers))


def received(graph: LayerGraph, inside: set[str], producers: set[str]) -> int:
    return sum(v.nbytes for v in graph.values if v.producer in producers and inside & set(v.consumers))


def stage_times(graph: LayerGraph, costs: list[int], stages: list[tuple[str, ...]], link: Link | None) -> list[float]:
    seconds = dict(zip(graph.names, costs))
    times = []
    for stage in stages:
        nbytes = received(graph, set(stage), set(graph.names) - set(stage))
        moving = link.latency_s + nbytes / link.bytes_per_s if link and nbytes else 0.0
        times.append(sum(seconds[name] for name in stage) + moving)
    return times


def inner_runs(graph: LayerGraph) -> list[tuple[int, int]]:
    names, size = graph.names, len(graph.layers)
    runs = [(i, j) for i in range(size) for j in range(i + 1, size + 1) if graph.output not in names[i:j]]
    inputs = set(names) - {c for v in graph.values for c in v.consumers}
    return [(i, j) for i, j in runs if not inputs & set(names[i:j])] or runs


def split(graph: LayerGraph, i: int, j: int) -> list[tuple[str, ...]]:
    return [graph.names[i:j], graph.names[:i] + graph.names[j:]]


def crossing(graph: LayerGraph, i: int, j: int) -> int:
    inner, outer = map(set, split(graph, i, j))
    return received(graph, inner, outer) + received(graph, outer, inner)


def live(graph: LayerGraph, costs: list[int], i: int, j: int) -> int:
    left = graph.to_networkx().subgraph(split(graph, i, j)[1])
    return sum(cost for name, cost in zip(graph.names, costs) if name in left and nx.has_path(left, name, graph.output))


def off_centre(costs: list[int], i: int, j: int) -> int:
    return abs(sum(costs[:i]) - sum(costs[j:]))


@settings(deadline=None)
@given(graphs())
def test_bytes_match_a_literal_count(graph: LayerGraph) -> None:
    into, out = bytes_in(graph), bytes_out(graph)
    for i in range(len(graph.layers) + 1):
        for j in range(i, len(graph.layers) + 1):
            inside, before, after = (set(graph.names[s]) for s in (slice(i, j), slice(i), slice(j, None)))
            assert into[i, j] == received(graph, inside, before)
            assert out[i, j] == received(graph, after, inside)


@settings(max_examples=150, deadline=None)
@given(st.data(), graphs(), links)
def test_linear_is_optimal(data: st.DataObject, graph: LayerGraph, link: Link | None) -> None:
    costs = data.draw(costs_for(graph))
    last = graph.names.index(graph.output)
    count = data.draw(st.integers(1, min(4, last + 1)))
    found = linear(graph, costs, count, link)
    found.check_covers(graph)
    assert [name for stage in found.stages for name in stage] == list(graph.names)
    best = min(
        max(stage_times(graph, costs, [graph.names[a:b] for a, b in zip((0, *cut), (*cut, len(costs)))], link))
        for cut in combinations(range(1, last + 1), count - 1)
    )
    assert max(stage_times(graph, costs, list(found.stages), link)) == pytest.approx(best)


@settings(max_examples=200, deadline=None)
@given(st.data(), graphs(), links)
def test_nested_is_optimal(data: st.DataObject, graph: LayerGraph, link: Link | None) -> None:
    costs = data.draw(costs_for(graph))
    slack = data.draw(st.sampled_from([0.0, 0.3]))
    found = nested(graph, costs, link, slack=slack)
    found.check_covers(graph)
    runs = inner_runs(graph)
    slowest = {run: max(stage_times(graph, costs, split(graph, *run), link)) for run in runs}
    limit = min(slowest.values()) * (1 + slack)
    tied = [run for run in runs if slowest[run] <= limit]
    best = min(tied, key=lambda run: (crossing(graph, *run), off_centre(costs, *run), *run))
    assert list(found.stages) == split(graph, *best)


@settings(max_examples=200, deadline=None)
@given(st.data(), graphs())
def test_thin_is_optimal(data: st.DataObject, graph: LayerGraph) -> None:
    costs = data.draw(costs_for(graph))
    share = data.draw(st.sampled_from([0.25, 0.5]))
    slack = data.draw(st.sampled_from([0.0, 0.25]))
    runs = inner_runs(graph)
    outer = {run: sum(costs) - sum(costs[run[0]:run[1]]) for run in runs}
    fits = [run for run in runs if outer[run] <= share * sum(costs)]
    if not fits:
        with pytest.raises(InputError, match="ask for a larger share"):
            thin(graph, costs, share, slack=slack)
        return
    alive = {run: live(graph, costs, *run) for run in fits}
    tied = [run for run in fits if alive[run] >= max(alive.values()) * (1 - slack)]
    best = min(tied, key=lambda run: (crossing(graph, *run), off_centre(costs, *run), *run))
    assert list(thin(graph, costs, share, slack=slack).stages) == split(graph, *best)


def test_nested_follows_the_symmetry_of_a_unet() -> None:
    graph = unet_like(8)
    inner, outer = nested(graph, [1.0] * len(graph.layers), slack=0.2).stages
    assert abs(len(inner) - len(outer)) <= 4
    first = graph.names.index(inner[0])
    assert abs(first - (len(graph.layers) - first - len(inner))) <= 2
    assert Partition(name="n", stages=(inner, outer)).is_nested(graph)


def test_thin_keeps_what_follows_in_a_plain_chain() -> None:
    graph = graph_of(12, [(0, tuple(range(1, 12)), 1), *((i, (i + 1,), 8) for i in range(1, 11))])
    inner, outer = thin(graph, [0.1] + [1.0] * 11, 0.4).stages
    assert inner == tuple(f"l{i}" for i in range(1, 8))
    assert outer == ("l0", "l8", "l9", "l10", "l11")


def test_candidates_are_named_and_distinct() -> None:
    graph = unet_like(10)
    partitions = candidate_partitions(graph, [1.0] * len(graph.layers))
    assert [p.name for p in partitions] == ["linear", "nested", "thin"]
    for partition in partitions:
        partition.check_covers(graph)
    outer = partitions[2].stages[1]
    assert len(outer) <= len(graph.layers) / 4


def test_equal_candidates_are_given_once() -> None:
    graph = graph_of(2, [(0, (1,), 4)])
    assert [p.name for p in candidate_partitions(graph, [1.0, 1.0])] == ["linear"]
    assert candidate_partitions(graph_of(1, []), [1.0]) == ()


def changes_for(graph: LayerGraph) -> st.SearchStrategy[dict[str, float]]:
    """Relative changes that are exact in millionths."""
    names = [value.name for value in graph.values]
    return st.fixed_dictionaries({name: st.sampled_from([0.0, 0.03125, 0.25, 0.5, 2.0]) for name in names})


def lost(graph: LayerGraph, inside: set[str], producers: set[str], change: dict[str, float]) -> tuple[float, int]:
    """Bytes times change, and bytes, of what `inside` receives from `producers`."""
    taken = [v for v in graph.values if v.producer in producers and inside & set(v.consumers)]
    return sum(v.nbytes * change[v.name] for v in taken), sum(v.nbytes for v in taken)


def price(*lots: tuple[float, int]) -> int:
    """One number: bytes times change in millionths, and bytes."""
    return sum(round(1e6 * changed) + nbytes for changed, nbytes in lots)


@settings(max_examples=150, deadline=None)
@given(st.data(), graphs(), links)
def test_linear_prefers_what_changes_least(data: st.DataObject, graph: LayerGraph, link: Link | None) -> None:
    costs, change = data.draw(costs_for(graph)), data.draw(changes_for(graph))
    last = graph.names.index(graph.output)
    count, slack = data.draw(st.integers(1, min(4, last + 1))), data.draw(st.sampled_from([0.0, 0.1, 0.5]))
    found = linear(graph, costs, count, link, slack=slack, change=change)
    found.check_covers(graph)
    splits = [
        [graph.names[a:b] for a, b in zip((0, *cut), (*cut, len(costs)))]
        for cut in combinations(range(1, last + 1), count - 1)
    ]
    slowest = [max(stage_times(graph, costs, stages, link)) for stages in splits]
    fast = [split for split, time in zip(splits, slowest) if time <= min(slowest) * (1 + slack) + 1e-9]

    def loss(stages: list[tuple[str, ...]]) -> int:
        return price(*(lost(graph, set(s), set(graph.names) - set(s), change) for s in stages))

    assert list(found.stages) in fast
    assert loss(list(found.stages)) == min(map(loss, fast))


@settings(max_examples=200, deadline=None)
@given(st.data(), graphs(), links)
def test_nested_prefers_what_the_estimate_loses_least_by(
    data: st.DataObject, graph: LayerGraph, link: Link | None
) -> None:
    costs, change = data.draw(costs_for(graph)), data.draw(changes_for(graph))
    slack = data.draw(st.sampled_from([0.0, 0.3]))
    runs = inner_runs(graph)
    slowest = {run: max(stage_times(graph, costs, split(graph, *run), link)) for run in runs}
    tied = [run for run in runs if slowest[run] <= min(slowest.values()) * (1 + slack)]

    def loss(run: tuple[int, int]) -> int:
        inner, outer = map(set, split(graph, *run))
        return price(lost(graph, outer, inner, change), (0, received(graph, inner, outer)))

    best = min(tied, key=lambda run: (loss(run), off_centre(costs, *run), *run))
    assert list(nested(graph, costs, link, slack=slack, change=change).stages) == split(graph, *best)


def test_equal_change_of_everything_leaves_the_fewest_bytes() -> None:
    """Where all that crosses flows one way, weighing by one number moves nothing."""
    graph = graph_of(9, [(i, (i + 1,), 8 + (i * 5) % 7) for i in range(8)])
    still = dict.fromkeys((value.name for value in graph.values), 0.25)
    assert thin(graph, [1.0] * 9, 0.5, slack=0.5, change=still) == thin(graph, [1.0] * 9, 0.5, slack=0.5)


def test_candidates_move_to_steady_cuts() -> None:
    """Two cuts take equally long; the one that changes less is taken, whichever it is."""
    graph = graph_of(5, [(i, (i + 1,), 8) for i in range(4)])
    costs = [2.0, 1.0, 0.01, 1.0, 2.0]
    ends = []
    for restless in ("v1", "v2"):
        change = {value.name: 0.5 if value.name == restless else 0.1 for value in graph.values}
        found = {p.name: p for p in candidate_partitions(graph, costs, change=change)}
        assert found == {p.name: p for p in candidate_partitions(graph, costs, change=change)}
        ends.append(len(found["linear"].stages[0]))
    assert ends == [3, 2]


def test_two_hundred_layers_take_under_a_second() -> None:
    graph = unet_like(99)
    costs = np.random.default_rng(0).uniform(0.1, 1.0, len(graph.layers)).tolist()
    began = time.perf_counter()
    candidate_partitions(graph, costs)
    linear(graph, costs, 8)
    assert time.perf_counter() - began < 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: linear(g, [1.0] * 3), "got costs of 3 layers, the graph has 4"),
        (lambda g: linear(g, [1.0, -1.0, 1.0, 1.0]), "not negative"),
        (lambda g: linear(g, [1.0] * 4, 0), "got 0 stages"),
        (lambda g: linear(g, [1.0] * 4, 5), "at most 4"),
        (lambda g: linear(g, [1.0] * 4, slack=-1), "got slack -1"),
        (lambda g: nested(g, [1.0] * 4, change={"v0": 0.1}), "got the change of 1 values, none of .'v1', 'v2'."),
        (lambda g: thin(g, [1.0] * 4, change={"v0": 0.1, "v1": -1, "v2": 0}), "got changes {'v1': -1}"),
        (lambda g: nested(g, [1.0] * 4, slack=-1), "got slack -1"),
        (lambda g: thin(g, [1.0] * 4, 1.5), "got share 1.5"),
        (lambda g: nested(graph_of(1, []), [1.0]), "2 layers or more"),
        (lambda g: candidate_partitions(g, []), "got costs of 0 layers"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(graph_of(4, [(0, (1,), 1), (1, (2,), 1), (2, (3,), 1)]))


def test_wrong_costs_are_usage_errors() -> None:
    with pytest.raises(UsageError):
        candidate_partitions(graph_of(2, []), [1.0])
