"""Step costs by hand."""

from __future__ import annotations

import pytest

from hybridiff_compiler.ir import Costs, InputError, Link, Pattern, RankSpec, StageCost, lower
from hybridiff_compiler.planner import Problem, step_cost
from hybridiff_compiler.planner.cost import CostModel, segment_seconds
from hybridiff_compiler.planner.placement import fastest_placement

from .profiles import make_profile

BASE = make_profile()
LAYERS = (0.1,) * len(BASE.graph.layers)
WHOLE = 0.1 * len(LAYERS)
SAMPLE_BYTES = 2 * 4 * 16 * 16


def profile_with(**costs: object):
    return BASE.model_copy(update={"costs": Costs.model_validate({"layers": {1: LAYERS}} | costs)})


def pattern(name: str) -> Pattern:
    return next(p for p in BASE.patterns if p.name == name)


def stage_size(partition: str, stage: int) -> float:
    return 0.1 * len(BASE.partition(partition).stages[stage])


def test_ideal_is_the_slowest_rank_from_layers() -> None:
    profile = profile_with()
    assert step_cost(profile, pattern("branch")).ideal_s == pytest.approx(WHOLE)
    assert step_cost(profile, pattern("single")).ideal_s == pytest.approx(2 * WHOLE)  # no batch-2 costs
    slowest = max(stage_size("nested", 0), stage_size("nested", 1))
    assert step_cost(profile, pattern("paper:nested")).ideal_s == pytest.approx(slowest)
    assert step_cost(profile, pattern("branch-reuse:thin")).ideal_s == pytest.approx(stage_size("thin", 1))
    assert step_cost(profile, pattern("reuse")).ideal_s == 0.0


def test_batch_costs_and_measured_stages_come_first() -> None:
    profile = profile_with(
        layers={1: LAYERS, 2: tuple(0.15 for _ in LAYERS)},
        stages=(
            StageCost(partition="whole", stages=(0,), batch=1, seconds=7.0),
            StageCost(partition="thin", stages=(1,), batch=1, seconds=3.0),
        ),
    )
    assert step_cost(profile, pattern("single")).ideal_s == pytest.approx(1.5 * WHOLE)
    assert step_cost(profile, pattern("branch")).ideal_s == 7.0
    assert step_cost(profile, pattern("branch-reuse:thin")).ideal_s == 3.0


def test_all_stages_fused_cost_what_the_whole_costs() -> None:
    profile = profile_with(stages=(StageCost(partition="whole", stages=(0,), batch=1, seconds=7.0),))
    fused = Pattern.parse("fused", "u0@0 u1@0 c0@1 c1@1 | cfg", partition="nested", stages=2)
    assert [str(s) for s in lower(fused)] == ["u[0,1]@0", "c[0,1]@1"]
    assert step_cost(profile, fused).ideal_s == 7.0
    assert segment_seconds(profile, lower(fused)[0], 2) == 7.0


def test_prediction_adds_overhead_and_the_exchange_with_rank_0() -> None:
    links = [
        Link(source=0, target=1, latency_s=0.5, bytes_per_s=SAMPLE_BYTES),
        Link(source=1, target=0, latency_s=0.25, bytes_per_s=SAMPLE_BYTES),
    ]
    profile = profile_with(links=links, step_overhead_s=0.125)
    branch = step_cost(profile, pattern("branch"))
    assert branch.latency_s == pytest.approx((0.5 + 1) + WHOLE + (0.25 + 1) + 0.125)
    assert branch.ideal_s == pytest.approx(WHOLE)
    assert step_cost(profile, pattern("single")).latency_s == pytest.approx(2 * WHOLE + 0.125)
    assert step_cost(profile, pattern("reuse")).latency_s == pytest.approx(0.125)


def test_stale_values_hide_behind_the_drivers_overhead() -> None:
    paper = pattern("paper:nested")
    partition = BASE.partition("nested")
    outward = sum(v.nbytes for v in partition.cut(BASE.graph, 0, 1))
    links = [Link(source=0, target=1, latency_s=0.0, bytes_per_s=outward)]  # u0 takes a second to rank 1
    free = step_cost(profile_with(), paper).latency_s
    slow = step_cost(profile_with(links=links), paper).latency_s
    hidden = step_cost(profile_with(links=links, step_overhead_s=0.75), paper).latency_s
    sending = SAMPLE_BYTES / outward
    rank_1 = stage_size("nested", 1) + sending
    assert slow == pytest.approx(max(free, rank_1) + 1.0)
    assert hidden == pytest.approx(max(free, rank_1) + 0.25 + 0.75)


def test_fresh_reads_across_ranks_wait() -> None:
    relay = Pattern.parse("relay", "c0@0(c1~) c1@1 | mirror", partition="linear", stages=2)
    assert step_cost(profile_with(), relay).ideal_s == pytest.approx(WHOLE)


def test_missing_costs_are_named() -> None:
    with pytest.raises(InputError, match="no layer costs for 1 branch"):
        step_cost(profile_with(layers={2: LAYERS}), pattern("branch"))


def test_slower_ranks_take_longer_and_bound_the_step() -> None:
    profile = profile_with()
    half = [RankSpec(device="cpu"), RankSpec(device="cpu", speed=0.5)]
    assert step_cost(profile, pattern("branch"), half).ideal_s == pytest.approx(2 * WHOLE)
    assert step_cost(profile, pattern("single"), half).ideal_s == pytest.approx(2 * WHOLE)
    with pytest.raises(InputError, match="'branch' needs 2 ranks, got 1"):
        step_cost(profile, pattern("branch"), half[:1])


def test_exposed_stale_values_cost_their_whole_transfer() -> None:
    paper = pattern("paper:nested")
    outward = sum(v.nbytes for v in BASE.partition("nested").cut(BASE.graph, 0, 1))
    links = [Link(source=0, target=1, latency_s=0.0, bytes_per_s=outward)]
    profile = profile_with(links=links, step_overhead_s=0.75)
    hidden, shown = (step_cost(profile, paper, overlap=overlap).latency_s for overlap in (True, False))
    assert shown == pytest.approx(hidden + 0.75)


def test_ranks_that_were_not_measured_count_as_the_slowest_measured_link() -> None:
    links = [
        Link(source=0, target=1, latency_s=0.5, bytes_per_s=1e12),
        Link(source=1, target=0, latency_s=0.25, bytes_per_s=1e12),
    ]
    far = Pattern.parse("far", "u0@0 c0@2 | cfg")
    assert step_cost(profile_with(links=links), far).latency_s == pytest.approx(0.5 + WHOLE + 0.5)


def test_what_a_stage_recomputes_costs_time_and_is_not_sent() -> None:
    linear = BASE.partition("linear")
    again = linear.model_copy(update={"recomputed": ((), ("l0",))})
    links = [Link(source=0, target=1, latency_s=0.0, bytes_per_s=1.0)]
    before = profile_with(links=links)
    after = before.model_copy(update={
        "partitions": tuple(again if p.name == "linear" else p for p in before.partitions)
    })
    pipe = Pattern.parse("pipe", "c0@0(c1~) c1@1(c0~) | delta", partition="linear", stages=2)
    assert step_cost(after, pipe).ideal_s == pytest.approx(step_cost(before, pipe).ideal_s + 0.1)
    assert step_cost(after, pipe).latency_s == pytest.approx(step_cost(before, pipe).latency_s + 0.1 - 1)


def test_heavy_work_goes_to_fast_ranks() -> None:
    thin = Pattern.parse("cond-pipe:thin", "c0@0(c1~) c1@1(c0~) | delta", partition="thin", stages=2)
    ranks = [RankSpec(device="cpu", speed=speed) for speed in (0.25, 1.0)]
    profile = profile_with()
    placed = fastest_placement(thin, 2, CostModel(profile, ranks), [0.25, 1.0])
    assert [unit.rank for unit in placed.units] == [1, 0]  # the inner stage is the larger one
    assert Problem(profile, 2, ranks=ranks).costs["branch"].ideal_s == pytest.approx(4 * WHOLE)
