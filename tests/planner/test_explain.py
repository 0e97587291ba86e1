"""Explanations of plans."""

from __future__ import annotations

import pytest

from hybridiff_compiler.ir import Guidance, Plan, PlanMismatchError, Profile
from hybridiff_compiler.planner import Problem, explain, frontier, plan
from hybridiff_compiler.planner.explain import target_of


@pytest.fixture(scope="module")
def profile() -> Profile:
    from .profiles import make_profile

    return make_profile(num_steps=20, max_age=3)


def test_runs_buy_and_cost_what_the_predictions_say(profile: Profile) -> None:
    made = plan(profile, min_psnr=28)
    found, problem = explain(profile, made), Problem(profile, 2)
    assert found.latency_ms == pytest.approx(1e3 * made.predictions.latency_s)
    assert found.psnr_db == pytest.approx(made.predictions.psnr_db)
    steps = made.schedule.steps
    cheap = [index for index, name in enumerate(steps) if name != "branch"]
    assert [step for run in found.runs for step in range(run.start, run.stop)] == cheap
    for run in found.runs:
        exact = tuple("branch" if run.start <= i < run.stop else name for i, name in enumerate(steps))
        assert run.saved_ms == pytest.approx(1e3 * (problem.latency_s(exact) - problem.latency_s(steps)))
        repaired, as_is = (problem.psnr_db(problem.error(names)) for names in (exact, steps))
        assert run.cost_db == pytest.approx(repaired - as_is)
        assert 0 < run.error_share <= 1
        assert sum(run.patterns.values()) == run.stop - run.start


def test_what_binds_and_what_more_would_buy(profile: Profile) -> None:
    by_quality, by_latency = plan(profile, min_psnr=28), plan(profile, speedup=3)
    assert explain(profile, by_quality).binding.startswith("quality: 28 dB asked for, with")
    assert explain(profile, by_latency).binding.startswith("latency: ")
    points = frontier(profile)
    found = explain(profile, by_quality)
    more = next(trade for trade in found.trades if trade.what == "1 dB more")
    enough = [p for p in points if p.psnr_db is None or p.psnr_db >= by_quality.predictions.psnr_db + 1]
    assert more.latency_ms == pytest.approx(1e3 * enough[0].latency_s)
    assert more.delta_ms > 0
    assert more.delta_db >= 1
    slower = next(trade for trade in found.trades if trade.what == "10 ms more")
    assert 0 <= slower.delta_ms <= 10 + 1e-3
    assert {t.what for t in found.trades} == {"1 dB more", "1 dB less", "10 ms more", "10 ms less"}


def test_other_targets_and_kinds(profile: Profile) -> None:
    short = plan(profile, min_psnr=26, num_inference_steps=12, without=("reuse",), costs="work")
    target, words = target_of(short)
    assert target is not None
    assert (target.min_psnr, words["steps"], words["without"], words["costs"]) == (26, "12", "reuse", "work")
    assert explain(profile, short).runs
    assert explain(profile, plan(profile, policy="paper")).binding.startswith("none: the schedule was not solved")
    exact = explain(profile, plan(profile, policy="exact"))
    assert (exact.runs, exact.psnr_db) == ((), None)
    hand_made = plan(profile, min_psnr=26).with_steps(("branch",) * 20)
    assert explain(profile, hand_made).binding.startswith("none")
    other = Plan(**(dict(short) | {"model": short.model.model_copy(update={"fingerprint": "1" * 64})}))
    with pytest.raises(PlanMismatchError, match="give the profile that it was made from"):
        explain(profile, other)


def test_milliseconds_are_measured_ones_where_work_was_solved_for(profile: Profile) -> None:
    made = plan(profile, speedup=3, costs="work")
    found = explain(profile, made)
    assert found.latency_ms == pytest.approx(1e3 * made.predictions.latency_s)
    assert found.binding.startswith("work: 13.33 evaluations allowed, predicted 1")
    slower = next(trade for trade in found.trades if trade.what == "10 ms more")
    assert 0 < slower.delta_ms <= 10 + 1e-3
    for run in found.runs:
        assert 0 < run.saved_ms < found.latency_ms


def test_ranks_with_their_own_stages_are_compared_with_what_they_can_run(profile: Profile) -> None:
    made = plan(profile, min_psnr=28, weights="stages")
    found = explain(profile, made)
    relay = Problem(profile, 2, weights="stages")
    assert found.latency_ms == pytest.approx(1e3 * made.predictions.latency_s)
    for run in found.runs:
        saved = (run.stop - run.start) * relay.costs[relay.exact.name].latency_s
        cheap = sum(count * relay.costs[name].latency_s for name, count in run.patterns.items())
        assert run.saved_ms == pytest.approx(1e3 * (saved - cheap))
    fastest = frontier(profile, weights="stages")[0].latency_s
    assert all(trade.latency_ms >= 1e3 * fastest - 1e-6 for trade in found.trades)


def test_runs_are_compared_with_the_exact_steps_of_the_plan(profile: Profile) -> None:
    """With a rank this slow, exact steps are those of the other one alone."""
    made = plan(profile, min_psnr=28, speeds=(1.0, 0.1))
    assert made.exact == "single"
    problem = Problem(profile, 2, ranks=made.ranks)
    for run in explain(profile, made).runs:
        cheap = sum(count * problem.costs[name].latency_s for name, count in run.patterns.items())
        exact = (run.stop - run.start) * problem.costs["single"].latency_s
        assert run.saved_ms == pytest.approx(1e3 * (exact - cheap))


def test_neighbours_fit_the_memory_of_the_ranks(profile: Profile) -> None:
    limit = max(plan(profile, policy="exact").predictions.peak_bytes)
    made = plan(profile, min_psnr=40, memory_bytes=limit)
    for trade in explain(profile, made).trades:
        better = plan(profile, max_latency_ms=trade.latency_ms * (1 + 1e-9), memory_bytes=limit)
        assert better.predictions.psnr_db == pytest.approx(trade.psnr_db)
    assert explain(profile, plan(profile, min_psnr=40)).trades != explain(profile, made).trades


def test_the_published_rule_is_explained_as_predicted(profile: Profile) -> None:
    flat = tuple(max(0.1, 0.3 - 0.05 * step) for step in range(profile.num_steps))
    early = profile.model_copy(update={
        "guidance": Guidance(rel_mae=(flat,)), "scheduler": "FlowMatchEulerDiscreteScheduler",
    })
    made = plan(early, policy="paper")
    assert made.schedule.resolve(flat).steps != made.schedule.resolve(()).steps
    found = explain(early, made)
    assert found.psnr_db == pytest.approx(made.predictions.psnr_db)
    assert [(run.start, run.stop) for run in found.runs] == [
        (step, step + made.schedule.k) for step in [made.schedule.window_start(flat)]
    ]
