"""Step costs by hand."""

from __future__ import annotations

import pytest

from hybridiff_compiler.ir import Costs, InputError, Link, Pattern, StageCost, lower
from hybridiff_compiler.planner import step_cost
from hybridiff_compiler.planner.cost import segment_seconds

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
        step_cost(profile_with(layers={}), pattern("branch"))
