"""Adaptive plans from measured prompts: grouping against brute force, and what comes out against its own promises."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.ir import (
    FixedSchedule,
    InputError,
    Plan,
    PlanMismatchError,
    Profile,
    SwitchedSchedule,
    UsageError,
)
from hybridiff_compiler.planner import Problem, PromptSamples, plan, switched_plan
from hybridiff_compiler.planner.switching import best_groups, fit_line

from .profiles import make_profile

STEPS = 20


@pytest.fixture(scope="module")
def profile() -> Profile:
    base = make_profile(num_steps=STEPS, max_age=3)
    spread = base.compounding.model_copy(update={"prompt_std_db": 3.0, "prompts": 24})
    return base.model_copy(update={"compounding": spread})


def samples_of(profile: Profile, *, noise: float, count: int = 24, seed: int = 0) -> PromptSamples:
    """Prompts whose offset falls by 3 dB per 0.1 of discrepancy, plus noise."""
    rng = np.random.default_rng(seed)
    level = 0.3 + 0.1 * rng.normal(size=count)
    offset = -30 * (level - 0.3) + noise * rng.normal(size=count)
    return PromptSamples(
        fingerprint=profile.model.fingerprint, num_steps=STEPS, prompts=tuple(f"p{k}" for k in range(count)),
        rel_mae=tuple((float(value),) * STEPS for value in level), schedules=("a", "b"),
        psnr_db=(tuple((30 + offset).tolist()), tuple((36 + offset).tolist())),
    )


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 7), st.integers(1, 4), st.randoms())
def test_groups_are_those_of_brute_force(count: int, most: int, random) -> None:
    latency = np.full((count + 1, count + 1), np.inf)
    for i, j in itertools.combinations(range(count + 1), 2):
        latency[i, j] = random.choice([1.0, 2.0, 3.0, 5.0, math.inf])
    best = math.inf
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, count), k) for k in range(most)):
        ends = (0, *cuts, count)
        best = min(best, sum(latency[i, j] * (j - i) for i, j in itertools.pairwise(ends)))
    mean, cuts = best_groups(latency, most)
    assert mean == best / count
    if math.isfinite(mean):
        ends = (0, *cuts, count)
        assert len(cuts) < most
        assert sum(latency[i, j] * (j - i) for i, j in itertools.pairwise(ends)) / count == pytest.approx(mean)


def test_a_line_is_least_squares() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=500), rng.normal(size=500)
    line = fit_line(x.tolist(), (2 * x + 1 + 0.5 * noise).tolist())
    assert (line.slope, line.intercept, line.std_db) == pytest.approx((2, 1, 0.5), abs=0.1)
    assert line.explained == pytest.approx(4 / 4.25, abs=0.03)
    assert line.worst(-1, 3) == pytest.approx(-1, abs=0.2)
    assert fit_line([1.0, 1.0], [0.0, 2.0]).slope == 0


def test_what_discrepancy_explains_makes_plans_faster(profile: Profile) -> None:
    samples = samples_of(profile, noise=0.2)
    fixed = plan(profile, min_psnr=25, quantile=0.05)
    made = switched_plan(profile, samples, min_psnr=25, quantile=0.05)
    rule, problem = made.schedule, Problem(profile, 2)
    assert isinstance(rule, SwitchedSchedule)
    assert 2 <= len(rule.choices) <= 3
    assert made.predictions.latency_s < fixed.predictions.latency_s
    ran = [rule.resolve(row) for row in samples.rel_mae]
    latencies = [problem.latency_s(schedule.steps) for schedule in ran]
    assert np.mean(latencies) == pytest.approx(made.predictions.latency_s)
    assert latencies[int(np.argmin(samples.offsets_db))] > latencies[int(np.argmax(samples.offsets_db))]
    z = NormalDist().inv_cdf(0.05)
    for schedule, offset in zip(ran, samples.offsets_db):
        error = problem.error(schedule.steps)
        assert problem.psnr_db(error) + offset + z * 0.2 >= 25 - 0.5
    assert Plan.parse(made.model_dump_json()) == made
    assert made.certificate is None


def test_without_anything_to_gain_the_fixed_plan_is_returned(profile: Profile) -> None:
    made = switched_plan(profile, samples_of(profile, noise=8.0), min_psnr=22)
    assert isinstance(made.schedule, FixedSchedule)
    assert made.schedule == plan(profile, min_psnr=22, quantile=0.05).schedule


def test_samples_round_trip_and_add_up(profile: Profile, tmp_path) -> None:
    samples = samples_of(profile, noise=1.0)
    assert PromptSamples.load(samples.save(tmp_path / "samples.json")) == samples
    assert sum(samples.offsets_db) == pytest.approx(0, abs=1e-9)
    assert samples.unexplained_db == pytest.approx(0, abs=1e-9)


def test_wrong_arguments_are_named(profile: Profile) -> None:
    samples = samples_of(profile, noise=1.0)
    with pytest.raises(UsageError, match="solved for min_psnr"):
        switched_plan(profile, samples)
    with pytest.raises(UsageError, match="solved for min_psnr"):
        switched_plan(profile, samples, min_psnr=30, speedup=3)
    with pytest.raises(UsageError, match="got choices=1"):
        switched_plan(profile, samples, min_psnr=30, choices=1)
    with pytest.raises(InputError, match="4 prompts were measured"):
        switched_plan(profile, samples_of(profile, noise=1.0, count=4), min_psnr=30)
    with pytest.raises(PlanMismatchError, match="at 20 steps, the plan is for"):
        switched_plan(profile, samples, min_psnr=30, num_inference_steps=25)
