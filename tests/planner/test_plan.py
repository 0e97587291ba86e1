"""Plans for targets and policies, and the schedules to compare them with."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from hybridiff_compiler.ir import (
    AdaptiveSchedule,
    Costs,
    FixedSchedule,
    Guidance,
    InputError,
    Pattern,
    PatternErrors,
    Plan,
    Profile,
    TargetError,
    UsageError,
)
from hybridiff_compiler.planner import (
    Problem,
    alternating_plan,
    alternating_steps,
    family_of,
    fewer_steps,
    frontier,
    plan,
    proposals,
)


@pytest.fixture(scope="module")
def profile() -> Profile:
    from .profiles import make_profile

    return make_profile(num_steps=20, max_age=4)


def bare(profile: Profile, **changes: object) -> Profile:
    return profile.model_copy(update={"errors": ()} | changes)


def test_the_frontier_trades_latency_for_error(profile: Profile) -> None:
    points = frontier(profile)
    latencies, errors = [p.latency_s for p in points], [p.error for p in points]
    assert latencies == sorted(latencies)
    assert errors == sorted(errors, reverse=True)
    assert len(set(latencies)) == len(points)
    assert points[-1].steps == ("branch",) * 20
    assert points[-1].psnr_db is None
    assert points[-1].error == 0
    assert all(p.steps[0] == p.steps[-1] == "branch" and len(p.steps) == 20 for p in points)
    assert points[0].speedup > 4
    assert points[0].ideal_speedup > points[0].speedup


@pytest.mark.parametrize("min_psnr", [25.0, 30.0, 35.0, 40.0])
@pytest.mark.parametrize("gpus", [1, 2])
def test_min_psnr_is_met_with_the_reserve_as_fast_as_possible(profile: Profile, min_psnr: float, gpus: int) -> None:
    made = plan(profile, gpus=gpus, min_psnr=min_psnr)
    predicted = made.predictions
    assert predicted.psnr_db is not None
    assert predicted.psnr_db >= min_psnr + profile.compounding.reserve_db
    wanted = min_psnr + profile.compounding.reserve_db
    enough = [p for p in frontier(profile, gpus) if (p.psnr_db or math.inf) >= wanted]
    assert predicted.latency_s == pytest.approx(enough[0].latency_s)
    assert predicted.target == f"min_psnr={min_psnr:g}"
    assert made.world_size == gpus
    assert predicted.single_s is not None
    assert predicted.speedup == pytest.approx(predicted.single_s / predicted.latency_s)


def test_an_unreachable_quality_gives_the_exact_plan(profile: Profile) -> None:
    made = plan(profile, min_psnr=1e6)
    assert made.is_exact
    assert made.predictions.psnr_db is None


@pytest.mark.parametrize("speedup", [1.5, 2.5, 4.0])
def test_speedup_is_met_with_the_least_error(profile: Profile, speedup: float) -> None:
    made = plan(profile, speedup=speedup)
    assert made.predictions.speedup is not None
    assert made.predictions.speedup >= speedup * (1 - 1e-6)
    fast = [p for p in frontier(profile) if p.speedup >= speedup]
    assert made.predictions.psnr_db == pytest.approx(fast[-1].psnr_db) or fast[-1].psnr_db is None


def test_an_impossible_speedup_names_the_best(profile: Profile) -> None:
    best = frontier(profile)[0].speedup
    with pytest.raises(TargetError, match=r"1000x as fast as one; the fastest reaches \d+\.\d\dx") as e:
        plan(profile, speedup=1000)
    reachable = float(str(e.value).split("reaches ")[1].split("x")[0])
    assert best - 0.01 <= reachable <= best
    plan(profile, speedup=reachable)
    with pytest.raises(TargetError, match="on 1 GPU is"):
        plan(profile, gpus=1, speedup=1000)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.8])
def test_max_latency_is_met_with_the_least_error(profile: Profile, share: float) -> None:
    points = frontier(profile)
    limit = 1e3 * (points[0].latency_s + share * (points[-1].latency_s - points[0].latency_s))
    made = plan(profile, max_latency_ms=limit)
    fast = [p for p in points if 1e3 * p.latency_s <= limit]
    assert isinstance(made.schedule, FixedSchedule)
    assert made.schedule.steps == fast[-1].steps
    assert 1e3 * made.predictions.latency_s <= limit
    assert made.certificate is not None
    assert made.certificate.objective == "error"
    assert made.certificate.value == pytest.approx(fast[-1].error)
    assert 0 < made.certificate.lower_bound <= made.certificate.value


def test_quality_and_latency_together(profile: Profile) -> None:
    alone = plan(profile, min_psnr=30)
    speedup = alone.predictions.speedup
    assert speedup is not None
    assert plan(profile, min_psnr=30, speedup=speedup - 0.01).schedule == alone.schedule
    with pytest.raises(TargetError, match=r"30 dB at \S+x; the nearest are (\S+) dB at \S+, and 30 dB at (\S+)x") as e:
        plan(profile, min_psnr=30, speedup=speedup * 1.1)
    words = str(e.value).split("nearest are ")[1]
    quality, reachable = float(words.split(" dB")[0]), float(words.split("30 dB at ")[1].split("x")[0])
    assert quality < 30
    plan(profile, min_psnr=quality, speedup=speedup * 1.1)
    plan(profile, min_psnr=30, speedup=reachable)
    with pytest.raises(TargetError, match=r"to take 0\.1 ms or less; the fastest takes \d+\.\d\d ms at"):
        plan(profile, max_latency_ms=0.1)
    with pytest.raises(TargetError, match=r"to reach 30 dB in \d+ ms; the nearest are"):
        plan(profile, min_psnr=30, max_latency_ms=round(1e3 * alone.predictions.latency_s) - 2)


def test_a_quantile_keeps_more_in_reserve(profile: Profile) -> None:
    with pytest.raises(InputError, match="did not measure how the PSNR differs between prompts"):
        plan(profile, min_psnr=28, quantile=0.05)
    spread = profile.compounding.model_copy(update={"prompt_std_db": 2.0, "prompts": 24})
    known = profile.model_copy(update={"compounding": spread})
    mean, low = plan(known, min_psnr=28), plan(known, min_psnr=28, quantile=0.05)
    assert low.predictions.psnr_db > mean.predictions.psnr_db
    assert low.predictions.psnr_quantile_db == pytest.approx(low.predictions.psnr_db - 1.6449 * 2.0, abs=1e-3)
    assert low.predictions.psnr_quantile_db >= 28
    assert low.predictions.target == "min_psnr=28 quantile=0.05"
    assert (mean.predictions.quantile, mean.predictions.psnr_quantile_db) == (None, None)
    points = frontier(known, quantile=0.05)
    assert points[-1].psnr_quantile_db is None
    assert points[0].psnr_quantile_db == pytest.approx(points[0].psnr_db - 1.6449 * 2.0, abs=1e-3)
    enough = [p for p in points if (p.psnr_quantile_db or math.inf) >= 28 + Problem(known, 2).reserve_db(0.05)]
    assert low.schedule.steps == enough[0].steps


@pytest.mark.parametrize("target", [{"min_psnr": 27}, {"min_psnr": 33}, {"speedup": 2.5}, {"min_psnr": 30, "gpus": 1}])
def test_solved_plans_carry_a_certificate(profile: Profile, target: dict) -> None:
    made = plan(profile, **target)
    proof = made.certificate
    assert proof is not None
    assert proof.lower_bound <= proof.value
    assert proof.gap < 0.05
    assert proof.states > 1
    assert proof.labels > proof.states
    if proof.objective == "latency_s":
        assert proof.value == pytest.approx(made.predictions.latency_s)
    assert plan(profile, policy="exact").certificate is None


def test_work_does_not_depend_on_the_hardware(profile: Profile) -> None:
    made = plan(profile, speedup=3, costs="work")
    assert made.predictions.work_speedup is not None
    assert made.predictions.work_speedup >= 3 - 1e-6
    assert made.predictions.target == "speedup=3 costs=work"
    slower = profile.model_copy(update={"costs": profile.costs.model_copy(update={
        "stages": (), "step_overhead_s": 1.0, "layers": {1: profile.costs.layers[1]},
    })})
    assert plan(slower, speedup=3, costs="work").schedule == made.schedule
    assert plan(profile, policy="exact").predictions.work_speedup == pytest.approx(2)
    assert plan(profile, gpus=1, policy="exact").predictions.work_speedup == pytest.approx(1)
    points = frontier(profile, costs="work")
    assert all(p.work_speedup == pytest.approx(p.speedup) for p in points)
    assert points[-1].latency_s == pytest.approx(20)


def test_other_numbers_of_steps(profile: Profile) -> None:
    for steps in (10, 20, 40):
        made = plan(profile, min_psnr=28, num_inference_steps=steps)
        assert made.num_steps == steps
        assert made.provenance is not None
        assert made.provenance.profile_sha256 == profile.digest()
    image_to_image = plan(profile, speedup=2.5, strength=0.6)
    assert image_to_image.num_steps == 12
    assert len(frontier(profile, num_inference_steps=10)[0].steps) == 10


def test_policy_exact(profile: Profile) -> None:
    two, one = plan(profile, policy="exact"), plan(profile, gpus=1, policy="exact")
    assert str(two.schedule) == "branch*20"
    assert str(one.schedule) == "single*20"
    assert one.predictions.speedup == pytest.approx(1.0)
    assert one.predictions.ideal_speedup == pytest.approx(1.0)
    assert two.predictions.ideal_speedup == pytest.approx(1.9)
    assert two.predictions.psnr_db is None
    assert two.is_exact
    assert plan(bare(profile), policy="exact").is_exact


def test_policy_paper_has_the_published_constants() -> None:
    from .profiles import make_profile

    made = plan(make_profile(), policy="paper").schedule
    assert isinstance(made, AdaptiveSchedule)
    assert (made.history, made.eps, made.k, made.tau_cap) == (12, 4e-4, 5, 15)
    assert (made.warmup, made.window) == ("branch", "paper:nested")
    flow = plan(make_profile(scheduler="FlowMatchEulerDiscreteScheduler"), policy="paper").schedule
    assert isinstance(flow, AdaptiveSchedule)
    assert (flow.history, flow.eps, flow.k, flow.tau_cap) == (15, 5e-4, 5, 40)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 25, 100])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_policy_paper_scales_with_the_steps(steps: int, scheduler: str) -> None:
    from .profiles import make_profile

    made = plan(make_profile(num_steps=steps, scheduler=scheduler, max_age=2), policy="paper").schedule
    assert isinstance(made, AdaptiveSchedule)
    assert made.num_steps == steps
    if steps == 25 and scheduler == "DDIMScheduler":
        assert (made.history, made.k, made.tau_cap) == (6, 2, 8)
        assert made.eps == pytest.approx(8e-4)


def test_policy_paper_is_predicted_on_the_mean_discrepancy_curve(profile: Profile) -> None:
    profile = profile.model_copy(update={"scheduler": "FlowMatchEulerDiscreteScheduler"})
    flat = Guidance(rel_mae=((0.2,) * 20,))
    steep = Guidance(rel_mae=(tuple(np.linspace(9, 1, 20).tolist()),))
    early = plan(profile.model_copy(update={"guidance": flat}), policy="paper")
    late = plan(profile.model_copy(update={"guidance": steep}), policy="paper")
    assert early.predictions.psnr_db is not None
    assert late.predictions.psnr_db is not None
    assert early.predictions.psnr_db < late.predictions.psnr_db  # errors fall over the steps here
    assert plan(profile.model_copy(update={"guidance": None}), policy="paper").predictions.psnr_db is not None


def test_policy_paper_takes_the_partition_of_less_error(profile: Profile) -> None:
    swapped = {"paper:nested": "paper:linear", "paper:linear": "paper:nested"}
    errors = tuple(PatternErrors(pattern=swapped.get(e.pattern, e.pattern), curves=e.curves) for e in profile.errors)
    schedule = plan(profile.model_copy(update={"errors": errors}), policy="paper").schedule
    assert schedule.patterns == ("branch", "paper:linear")


def test_policy_paper_without_errors_takes_the_partition_of_fewer_bytes(profile: Profile) -> None:
    made = plan(bare(profile, patterns=()), policy="paper")
    assert made.schedule.patterns == ("branch", "paper:nested")
    assert made.predictions.psnr_db is None
    assert made.predictions.speedup is not None
    one = plan(profile, gpus=1, policy="paper")
    assert one.pattern("paper:nested").table == "u0@0(c1~) c1@0(u0~) | mirror"


def test_plans_hold_what_they_use_and_round_trip(profile: Profile) -> None:
    made = plan(profile, min_psnr=30)
    assert isinstance(made.schedule, FixedSchedule)
    used = set(made.schedule.steps) | {"branch"}
    assert {p.name for p in made.patterns} == used
    assert {p.name for p in made.partitions} == {p.partition for p in made.patterns} - {"whole"}
    assert Plan.parse(made.model_dump_json()) == made
    assert made.provenance is not None
    assert made.provenance.profile_sha256 == profile.digest()
    assert made.model == profile.model


def test_without_leaves_families_out(profile: Profile) -> None:
    for without in (("reuse",), ("branch-reuse",), ("reuse", "branch-reuse"), "reuse"):
        names = {family_of(name) for point in frontier(profile, 2, without) for name in point.steps}
        assert not names & ({without} if isinstance(without, str) else set(without))
    everything = ("paper", "cond-pipe", "cond-pipe-unguided", "branch-reuse", "reuse", "half-trend", "trend")
    assert plan(profile, min_psnr=20, without=everything).is_exact
    with_reuse, no_reuse = (plan(profile, min_psnr=20, without=w) for w in ((), ("reuse",)))
    assert with_reuse.predictions.latency_s <= no_reuse.predictions.latency_s + 1e-9


def test_device_follows_the_profile_unless_told(profile: Profile) -> None:
    cuda = profile.model_copy(update={"provenance": profile.provenance.model_copy(update={"device_type": "cuda"})})
    assert [r.device for r in plan(profile, policy="exact").ranks] == ["cpu", "cpu"]
    assert [r.device for r in plan(cuda, policy="exact").ranks] == ["cuda", "cuda"]
    assert [r.device for r in plan(cuda, policy="exact", device="cpu").ranks] == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "got targets: none; give exactly one of min_psnr, speedup, max_latency_ms and policy"),
        ({"max_latency_ms": 30, "speedup": 2}, "got targets: speedup=2, max_latency_ms=30"),
        ({"policy": "exact", "speedup": 2}, "got targets: speedup=2, policy=exact"),
        ({"max_latency_ms": 0}, "got max_latency_ms=0; give milliseconds above 0"),
        ({"min_psnr": 30, "quantile": 1.5}, "got quantile=1.5; give the share of prompts"),
        ({"speedup": 3, "quantile": 0.05}, "got quantile=0.05 without min_psnr"),
        ({"speedup": 3, "costs": "free"}, "got costs 'free'; choose from measured, work"),
        ({"max_latency_ms": 3, "costs": "work"}, "work has no milliseconds"),
        ({"speedup": 2, "num_inference_steps": 2}, "got 2 steps; a schedule needs at least 3"),
        ({"speedup": 2, "num_inference_steps": 500}, "got 500 steps; a profile of"),
        ({"speedup": 2, "strength": 0}, "got strength=0"),
        ({"policy": "fast"}, "got policy 'fast'; choose from exact, paper"),
        ({"policy": "exact", "gpus": 0}, "got 0 GPUs; patterns are generated for 1 to 64 ranks"),
        ({"policy": "exact", "gpus": -2}, "got -2 GPUs"),
        ({"policy": "exact", "gpus": 65}, "got 65 GPUs"),
        ({"min_psnr": 30, "without": ("magic",)}, "got without 'magic', which is no family"),
        ({"min_psnr": 30, "without": ("branch",)}, "choose from pipe, paper, cond-delta"),
        ({"policy": "paper", "without": ("paper",)}, "policy 'paper' cannot do without"),
        ({"min_psnr": math.nan}, "got min_psnr=nan"),
        ({"speedup": 0}, "got speedup=0; give a factor above 0"),
        ({"speedup": math.inf}, "got speedup=inf"),
        ({"policy": "exact", "device": "tpu"}, "got device 'tpu'; choose cpu or cuda"),
    ],
)
def test_wrong_arguments_are_usage_errors(profile: Profile, arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(profile, **arguments)


def test_a_profile_without_errors_allows_policies_only(profile: Profile) -> None:
    for arguments in ({"min_psnr": 30}, {"speedup": 2}):
        with pytest.raises(InputError, match=r"holds no pattern errors.*use the policy 'exact'"):
            plan(bare(profile), **arguments)
    with pytest.raises(InputError, match="no partition for the paper's pattern"):
        plan(bare(profile, partitions=(), patterns=()), policy="paper")


@pytest.mark.parametrize("overhead_s", [0.0, 0.001])
def test_a_profile_without_times_is_refused(profile: Profile, overhead_s: float) -> None:
    costs = Costs(layers={1: (0.0,) * len(profile.graph.layers)}, step_overhead_s=overhead_s)
    idle = profile.model_copy(update={"costs": costs})
    for target in ({"policy": "exact"}, {"policy": "paper"}, {"min_psnr": 30}, {"speedup": 2}):
        with pytest.raises(InputError, match="takes no time"):
            plan(idle, **target)
    with pytest.raises(InputError, match="takes no time"):
        frontier(idle)


def test_the_exact_policy_leaves_out_a_rank_that_would_hold_up_the_other(profile: Profile) -> None:
    assert plan(profile, policy="exact", speeds=(1, 0.6)).schedule.patterns == ("branch",)
    made = plan(profile, policy="exact", speeds=(1, 0.1))
    assert made.schedule.patterns == ("single",) == (made.exact,)
    assert made.predictions.speedup == pytest.approx(1)
    assert [pattern.name for pattern in made.patterns] == ["single"]


def test_patterns_without_errors_are_not_planned_with(profile: Profile) -> None:
    extra = Pattern.parse("mine", "c0@0 | mirror")
    measured = tuple(e for e in profile.errors if e.pattern != "reuse")
    points = frontier(profile.model_copy(update={"errors": measured, "patterns": (*profile.patterns, extra)}))
    assert not {"reuse", "mine"} & {name for point in points for name in point.steps}


def test_alternating_plan_costs_the_same(profile: Profile) -> None:
    made = plan(profile, min_psnr=30)
    row = alternating_plan(profile, made)
    assert row.predictions.ideal_speedup == pytest.approx(made.predictions.ideal_speedup, rel=0.1)
    assert set(row.schedule.patterns) == {"branch", "reuse"}
    assert made.predictions.latency_s <= row.predictions.latency_s or (
        made.predictions.psnr_db > row.predictions.psnr_db
    )
    assert str(alternating_plan(profile, plan(profile, policy="exact")).schedule) == "branch*20"
    with pytest.raises(UsageError, match="got pattern 'magic'"):
        alternating_plan(profile, made, "magic")
    with pytest.raises(UsageError, match="no ideal speed-up"):
        alternating_plan(profile, made.with_steps(("branch",) * 20))


def test_fewer_steps_cost_the_same(profile: Profile) -> None:
    assert fewer_steps(profile, plan(profile, policy="exact")) == 20
    made = plan(profile, speedup=3.5)
    assert fewer_steps(profile, made) == round(20 * 1.9 / made.predictions.ideal_speedup)


def test_alternating_steps_are_even() -> None:
    for num_steps, count in itertools.product(range(1, 12), range(10)):
        if count > max(0, num_steps - 2):
            with pytest.raises(UsageError, match=f"got {count} cheap steps"):
                alternating_steps(num_steps, count, "e", "c")
            continue
        steps = alternating_steps(num_steps, count, "e", "c")
        assert len(steps) == num_steps
        assert steps.count("c") == count
        assert steps[0] == steps[-1] == "e"
        runs = [len(list(g)) for name, g in itertools.groupby(steps[1:-1]) if name == "c"]
        assert max(runs, default=0) <= math.ceil(count / max(1, num_steps - 2 - count)) + 1


def test_proposals_spread_over_the_range(profile: Profile) -> None:
    found = proposals(profile)
    problem = Problem(profile, 2)
    assert len({steps for steps, _ in found}) == len(found) >= 6
    for steps, error in found:
        assert error > 0
        assert problem.error(steps) == pytest.approx(error)
    levels = [-20 * math.log10(error) for _, error in found]
    assert max(levels) - min(levels) > 10
    with pytest.raises(InputError, match="no pattern errors"):
        proposals(bare(profile))


def test_predictions_refuse_unknown_patterns(profile: Profile) -> None:
    problem = Problem(profile, 2)
    with pytest.raises(InputError, match="knows no pattern 'magic'"):
        problem.predict(("branch", "magic"))
    assert problem.predict(("branch",) + ("reuse",) * 18 + ("branch",)).psnr_db is None  # older than measured


def test_plans_for_unequal_ranks_use_the_fast_ones(profile: Profile) -> None:
    equal = plan(profile, gpus=3, min_psnr=30)
    unequal = plan(profile, gpus=3, min_psnr=30, speeds=(1.0, 0.25, 1.0))
    assert [rank.speed for rank in unequal.ranks] == [1.0, 0.25, 1.0]
    (branch,) = [pattern for pattern in unequal.patterns if pattern.name == "branch"]
    assert {unit.rank for unit in branch.units} == {0, 2}
    slow = plan(profile, gpus=3, min_psnr=30, speeds=(1.0, 0.25, 0.25))
    latencies = [made.predictions.latency_s or 0 for made in (equal, unequal, slow)]
    assert latencies == sorted(latencies)
    assert latencies[0] < latencies[2]
    with pytest.raises(UsageError, match=r"got speeds \[1.0, 0.5\] for 3 GPUs"):
        plan(profile, gpus=3, min_psnr=30, speeds=(1.0, 0.5))


def test_the_published_window_has_two_stages() -> None:
    """Also when a profile measured the table of four stages, with less error."""
    from hybridiff_compiler.ir import Profile
    from hybridiff_compiler.planner.policy import paper_window

    for name in ("unet", "mmdit"):
        profile = Profile.load(Path(__file__).parents[2] / "profiles" / "cpu" / f"{name}.json")
        assert any(pattern.name == "paper:linear4" for pattern in profile.patterns)
        for gpus in (1, 2, 4):
            assert paper_window(profile, gpus).stages == 2


def test_simpler_schedules_have_the_exact_steps_of_the_plan(profile: Profile) -> None:
    """Where the second rank is too slow to help, at the cost of steps on the first one."""
    made = plan(profile, min_psnr=30, speeds=(1, 0.1))
    simple = alternating_plan(profile, made)
    assert simple.exact == made.exact == "single"
    assert set(simple.schedule.patterns) == {"single", "reuse"}
    assert simple.predictions.ideal_speedup == pytest.approx(made.predictions.ideal_speedup, rel=0.1)
    assert fewer_steps(profile, made) == round(profile.num_steps / made.predictions.ideal_speedup)
