"""Schedules improved by measurement."""

from __future__ import annotations

from pathlib import Path

import pytest
from planner.profiles import make_profile

import hybridiff_compiler as hc
from hybridiff_compiler import reference_models
from hybridiff_compiler.ir import PlanMismatchError, UsageError
from hybridiff_compiler.quality.equal_cost import EqualCostRow, Judge
from hybridiff_compiler.quality.refine import refine

PROFILES = Path(__file__).parents[2] / "profiles" / "cpu"


class Pretended(Judge):
    """Quality is how early the exact steps come."""

    def measure(self, row: EqualCostRow) -> list[float]:
        return [-float(sum(i for i, name in enumerate(row.steps) if name == self.exact))]


def test_a_climb_keeps_the_cost_and_finds_what_is_better() -> None:
    judge = Pretended(None, make_profile(num_steps=12, max_age=3, depth=4))
    start = judge.row("start", 4.0, ("branch", "reuse", "reuse", "branch", *("reuse",) * 4, "branch", *("reuse",) * 2,
                                     "branch"))
    reports = []
    found = refine(
        judge, start, patterns=["reuse", "trend"], tries=200, seed=1, on_progress=lambda *each: reports.append(each)
    )
    assert found.psnr_db == -(0 + 1 + 2 + 3)
    assert found.work_speedup >= start.work_speedup - 1e-9
    assert found.steps[0] == "branch"
    assert [best for *_, best in reports] == sorted(best for *_, best in reports)


def test_a_plan_is_refined_within_its_latency_and_never_gets_worse() -> None:
    profile = hc.Profile.load(PROFILES / "mmdit.json")
    plan = hc.plan(profile, gpus=2, speedup=5)
    pipe = reference_models.load("mmdit")
    prompts = reference_models.PROFILING_PROMPTS[:1]
    options = {k: v for k, v in reference_models.DEFAULTS["mmdit"].items() if k == "max_sequence_length"}
    reports = []
    better = hc.refine_plan(
        plan, profile, pipe, prompts=prompts, tries=3, on_progress=lambda *each: reports.append(each), **options
    )
    assert [done for _, done, _ in reports] == [1, 2, 3]
    assert better.predictions.latency_s is not None
    assert plan.predictions.latency_s is not None
    assert better.predictions.latency_s <= plan.predictions.latency_s * (1 + 1e-6)
    assert "refined to" in better.predictions.target
    assert better.certificate is None
    before, after = (
        hc.verify(pipe, each, prompts=prompts, simulated=True, **options).psnr_db for each in (plan, better)
    )
    assert after >= before - 1e-3


def test_what_cannot_be_refined_is_refused() -> None:
    profile = hc.Profile.load(PROFILES / "mmdit.json")
    with pytest.raises(UsageError, match="only fixed ones can be refined"):
        hc.refine_plan(hc.plan(profile, gpus=2, policy="paper"), profile, None, prompts=["a cat"])
    with pytest.raises(UsageError, match="got no prompts"):
        hc.refine_plan(hc.plan(profile, gpus=2, speedup=4), profile, None, prompts=[])


def test_plans_of_another_profile_or_pipeline_are_refused_before_any_image() -> None:
    unet, mmdit = (hc.Profile.load(PROFILES / f"{name}.json") for name in ("unet", "mmdit"))
    plan = hc.plan(unet, policy="exact")
    with pytest.raises(PlanMismatchError, match="give the profile that it was made from"):
        hc.refine_plan(plan, mmdit, None, prompts=["cat"])
    with pytest.raises(PlanMismatchError, match="was made for a UNet2DConditionModel"):
        hc.refine_plan(plan, unet, reference_models.load("mmdit"), prompts=["cat"])
