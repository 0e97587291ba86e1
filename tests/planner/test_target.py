"""Targets against brute force: every schedule of a small profile, judged by the definition of the target."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext, suppress
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.ir import Profile, TargetError
from hybridiff_compiler.planner import Problem, plan
from hybridiff_compiler.planner.target import Target

from .profiles import make_profile

STEPS = 5


@cache
def small(seed: int) -> Profile:
    profile = make_profile(num_steps=STEPS, max_age=2, noise=0.8, seed=seed)
    spread = profile.compounding.model_copy(update={"prompt_std_db": 2.5, "prompts": 24})
    return profile.model_copy(update={"compounding": spread})


@cache
def every_schedule(seed: int, work: bool) -> tuple[tuple[float, float], ...]:
    """(latency, error) of all schedules that begin and end exactly and use measured ages."""
    from hybridiff_compiler.planner import in_work_units

    profile = in_work_units(small(seed)) if work else small(seed)
    problem = Problem(profile, 2)
    names = [table.pattern.name for table in problem.tables if table.pattern.name != "single"]
    found = []
    for inner in itertools.product(names, repeat=STEPS - 2):
        steps = ("branch", *inner, "branch")
        error = problem.error(steps)
        if error is not None:
            found.append((problem.latency_s(steps), error))
    return tuple(found)


seeds = st.integers(0, 5)


@settings(max_examples=200, deadline=None)
@given(seeds, st.floats(18, 45), st.none() | st.sampled_from([0.01, 0.05, 0.3, 0.9]))
def test_the_fastest_of_a_quality(seed: int, min_psnr: float, quantile: float | None) -> None:
    problem = Problem(small(seed), 2)
    target = Target(min_psnr=min_psnr, quantile=quantile)
    needed = target.needed_db(problem)
    assert needed is not None
    enough = [x for x, error in every_schedule(seed, False) if problem.judged_db(error, quantile) >= needed]
    made = plan(small(seed), min_psnr=min_psnr, quantile=quantile)
    proof = made.certificate
    assert proof is not None
    assert made.predictions.latency_s == pytest.approx(min(enough), rel=2e-2)  # latencies are rounded to ticks
    assert proof.lower_bound <= min(enough) * (1 + 1e-9)
    assert min(enough) <= proof.value * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(seeds, st.floats(0.0, 1.1), st.booleans())
def test_the_best_within_a_latency(seed: int, share: float, as_speedup: bool) -> None:
    problem = Problem(small(seed), 2)
    schedules = every_schedule(seed, False)
    fastest, slowest = min(schedules)[0], 5 * problem.costs["branch"].latency_s
    budget = fastest + share * (slowest - fastest) + 1e-6
    target = {"speedup": problem.single_s / budget} if as_speedup else {"max_latency_ms": 1e3 * budget}
    made = plan(small(seed), **target)
    proof = made.certificate
    assert proof is not None
    best = min(error for x, error in schedules if x <= budget)
    assert made.predictions.latency_s <= budget * (1 + 1e-6)
    assert proof.lower_bound <= best * (1 + 1e-9) + 1e-12
    coarser = budget - 2e-2 * slowest
    reference = [error for x, error in schedules if x <= max(coarser, fastest)]
    assert best - 1e-12 <= proof.value <= min(reference) + 1e-12


@settings(max_examples=120, deadline=None)
@given(seeds, st.floats(20, 40), st.floats(1.2, 5.0))
def test_both_or_the_nearest_of_each(seed: int, min_psnr: float, speedup: float) -> None:
    problem = Problem(small(seed), 2)
    target = Target(min_psnr=min_psnr, speedup=speedup)
    needed, budget = target.needed_db(problem), target.budget_s(problem)
    feasible = [
        x for x, error in every_schedule(seed, False) if problem.judged_db(error) >= needed and x <= budget
    ]
    with nullcontext() if feasible and min(feasible) <= budget * (1 - 2e-2) else suppress(TargetError):
        made = plan(small(seed), min_psnr=min_psnr, speedup=speedup)
        assert feasible
        assert made.predictions.latency_s <= budget * (1 + 1e-6)
        assert made.predictions.psnr_db is None or made.predictions.psnr_db >= needed - 1e-6


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(1.9, 4.5))
def test_work_is_planned_like_time(seed: int, speedup: float) -> None:
    schedules = every_schedule(seed, True)
    budget = 2 * STEPS / speedup
    if min(schedules)[0] > budget:
        with pytest.raises(TargetError):
            plan(small(seed), speedup=speedup, costs="work")
        return
    made = plan(small(seed), speedup=speedup, costs="work")
    best = min(error for x, error in schedules if x <= budget * (1 + 1e-9))
    assert made.certificate is not None
    assert made.certificate.lower_bound <= best * (1 + 1e-9) + 1e-12
    assert made.certificate.value <= min(error for x, error in schedules if x <= budget * 0.97 or error == 0) or (
        math.isclose(made.certificate.value, best)
    )
