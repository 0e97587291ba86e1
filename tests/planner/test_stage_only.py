"""Planning for ranks that hold the parameters of their stages only."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridiff_compiler.ir import InputError, Profile, UsageError, dry_run, lower
from hybridiff_compiler.planner import frontier, plan
from hybridiff_compiler.planner.cost import CostModel
from hybridiff_compiler.planner.stage_only import relay_pattern, stage_partition
from planner.profiles import make_profile


def test_every_rank_evaluates_one_stage_in_every_step() -> None:
    profile = make_profile(num_steps=30)
    solved = plan(profile, gpus=2, min_psnr=30, weights="stages")
    assert solved.weights == "stages"
    assert solved.exact == "relay:linear"
    assert len(set(solved.schedule.patterns)) > 1
    for pattern in solved.patterns:
        assert all(segment.stages == (segment.rank,) for segment in lower(pattern))
    dry_run([solved.pattern(name) for name in solved.schedule.steps])
    assert "weights=stages" in solved.predictions.target


def test_memory_is_that_of_the_stages() -> None:
    profile = Profile.load(Path(__file__).parents[2] / "profiles" / "cpu" / "unet.json")
    parameters = sum(layer.parameter_bytes for layer in profile.graph.layers)
    stages = plan(profile, gpus=2, policy="exact", weights="stages")
    whole = plan(profile, gpus=2, policy="exact")
    assert whole.weights == "whole"
    assert sum(whole.predictions.peak_bytes) - sum(stages.predictions.peak_bytes) > 0.8 * parameters


def test_branches_follow_each_other_through_the_relay() -> None:
    profile = make_profile()
    partition = stage_partition(profile, 2)
    relay, model = relay_pattern(partition), CostModel(profile)
    assert relay.is_exact
    first, second = (model.segment_seconds(s, 2) for s in lower(relay)[::2])
    expected = first + max(first, second) + second
    assert model.step(relay).ideal_s == pytest.approx(expected)


def test_the_frontier_has_no_whole_steps() -> None:
    points = frontier(make_profile(num_steps=20), 2, weights="stages")
    assert {name for point in points for name in point.steps}.isdisjoint({"single", "branch"})


def test_what_cannot_be_planned_is_refused() -> None:
    profile = make_profile(num_steps=20)
    with pytest.raises(InputError, match="needs a linear split into 3 stages; this profile has some into 2"):
        plan(profile, gpus=3, min_psnr=30, weights="stages")
    with pytest.raises(UsageError, match="2 ranks or more"):
        plan(profile, gpus=1, min_psnr=30, weights="stages")
    with pytest.raises(UsageError, match="choose from whole, stages"):
        plan(profile, gpus=2, min_psnr=30, weights="half")
    with pytest.raises(UsageError, match="policy 'paper'"):
        plan(profile, gpus=2, policy="paper", weights="stages")
