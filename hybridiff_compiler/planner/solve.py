"""From a profile and a target to a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Literal

from ..ir import (
    WHOLE,
    Certificate,
    FixedSchedule,
    InputError,
    Pattern,
    Plan,
    PlanProvenance,
    Predictions,
    Profile,
    RankSpec,
    Schedule,
    UsageError,
)
from ..ir.versions import installed_versions
from .certify import certify
from .fitting import Choice, Solved, best_that_fits, fits, peaks_of, peaks_of_steps, refused, within_limits
from .policy import paper_schedule, paper_window
from .problem import Problem
from .rescale import at_steps
from .schedule import Frontier, solve_frontier
from .tables import prune_dominated
from .target import POLICIES, Target
from .work import in_work_units
from .worlds import check_gpus

__all__ = [
    "COSTS", "POLICIES", "CostUnits", "FrontierPoint", "frontier", "make_plan", "plan", "plan_for_steps",
    "solve_problem",
]

Device = Literal["cpu", "cuda"]
CostUnits = Literal["measured", "work"]
COSTS: tuple[CostUnits, ...] = ("measured", "work")


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """One schedule that no other beats in both predicted latency and predicted error."""

    latency_s: float
    error: float
    """Sum of the step errors."""
    psnr_db: float | None
    """Predicted mean PSNR; None for exact schedules."""
    speedup: float
    """Predicted, over one rank."""
    ideal_speedup: float
    """Stage times alone."""
    work_speedup: float | None = None
    """In denoiser evaluations; see `Predictions.work_speedup`."""
    psnr_quantile_db: float | None = None
    """Of the quantile that was asked for."""
    steps: tuple[str, ...]


def plan(
    profile: Profile,
    *,
    gpus: int = 2,
    min_psnr: float | None = None,
    speedup: float | None = None,
    max_latency_ms: float | None = None,
    policy: str | None = None,
    quantile: float | None = None,
    num_inference_steps: int | None = None,
    strength: float = 1.0,
    costs: str = "measured",
    without: Iterable[str] = (),
    device: str | None = None,
    speeds: Sequence[float] | None = None,
    memory_bytes: Sequence[int | None] | int | None = None,
    weights: str = "whole",
) -> Plan:
    """The best plan for a target.

    Args:
        profile: measurements of one denoiser.
        gpus: ranks.
        min_psnr: lowest mean PSNR in dB, fastest schedule wins; `Compounding.reserve_db` is kept in reserve.
        speedup: predicted speed-up over one rank to reach, least error wins.
        max_latency_ms: predicted time of the denoising loop not to exceed, least error wins.
        policy: `exact` (every step exact) or `paper` (the published adaptive rule). One target is given, or `min_psnr`
            and one of the two latencies.
        quantile: `min_psnr` is for this quantile over prompts instead of the mean, e.g. 0.05.
        num_inference_steps: plan for another number of steps than the profile's; see `at_steps`.
        strength: of image-to-image; see `at_steps`.
        costs: `measured` seconds, or `work`: denoiser evaluations, whatever the hardware (then `speedup` is in these
            units; predictions are in both).
        without: families of patterns not to use, e.g. `reuse`.
        device: `cpu` or `cuda`; default: where the profile was measured.
        speeds: of every rank, relative to the profiled device, where they differ; rank 0 is the driver and the one
            that speed-ups are over.
        memory_bytes: what every rank may need at its peak (`memory.plan_memory`), one number for all or one per rank,
            None for no limit; see `fitting`.
        weights: `stages`: every rank holds the parameters of its stages only, for models that do not fit one; only
            patterns that allow that are used, and calls that the plan does not cover are refused when it runs.

    Raises:
        UsageError: no target or too many, or an argument out of range.
        TargetError: no schedule reaches the target within the memory; the message names the nearest ones.
        InputError: the profile lacks the measurements that the target needs.
    """
    target = Target(
        min_psnr=min_psnr, speedup=speedup, max_latency_ms=max_latency_ms, policy=policy, quantile=quantile
    )
    without = (without,) if isinstance(without, str) else tuple(without)
    asked = " ".join([
        str(target), *(["costs=work"] if costs == "work" else []),
        *([f"without={','.join(without)}"] if without else []),
        *([] if num_inference_steps is None else [f"steps={num_inference_steps}"]),
        *([] if strength == 1 else [f"strength={strength:g}"]),
        *([] if weights == "whole" else [f"weights={weights}"]),
    ])
    check_gpus(gpus)
    if costs not in COSTS:
        raise UsageError(f"got costs {costs!r}; choose from {', '.join(COSTS)}")
    if costs == "work" and max_latency_ms is not None:
        raise UsageError("work has no milliseconds; ask for a speedup, or plan with measured costs")
    ranks = _ranks(_device(profile, device), gpus, speeds, memory_bytes)
    scaled = at_steps(profile, num_inference_steps, strength=strength)
    if policy == "paper" and weights != "whole":
        raise UsageError("the policy 'paper' has whole exact steps on every rank; use weights='whole' with it")
    if policy == "paper":
        return within_limits(_paper_plan(scaled, gpus, without, ranks, asked, profile))
    problem = Problem(scaled, gpus, without, ranks=ranks, weights=weights)
    if policy == "exact":
        return within_limits(_exact_plan(problem, ranks, asked, profile))
    costed = scaled if costs == "measured" else in_work_units(scaled)

    @cache
    def solve(omitted: frozenset[str]) -> tuple[Problem, Frontier]:
        each = Problem(costed, gpus, without, ranks=ranks, weights=weights, omit=omitted)
        return each, solve_problem(each)

    def answer(choice: Choice) -> Solved | None:
        return best_that_fits(solve, choice, ranks, problem)

    best = answer(target.choice)
    if best is None:
        everything, solved = solve(frozenset())
        point = target.choose(everything, solved)
        needed = None if point is None else peaks_of_steps(problem, ranks, solved.steps(point))
        raise refused(target.refusal(everything, answer), ranks, needed)
    return plan_for_steps(
        problem, best.frontier.steps(best.point), ranks, asked, quantile=quantile,
        certificate=certify(best.problem, target, best.frontier, best.point), source=profile,
    )


def frontier(
    profile: Profile, gpus: int = 2, without: Iterable[str] = (), *, quantile: float | None = None,
    num_inference_steps: int | None = None, strength: float = 1.0, costs: str = "measured", weights: str = "whole",
) -> list[FrontierPoint]:
    """Every Pareto-optimal trade of predicted latency against predicted error, fastest first; arguments as for `plan`.

    With `costs="work"` latencies are evaluations instead of seconds.

    Raises:
        UsageError: an argument is out of range, or `without` names an unknown family.
        InputError: the profile has no pattern errors.
    """
    scaled = at_steps(profile, num_inference_steps, strength=strength)
    problem = Problem(in_work_units(scaled) if costs == "work" else scaled, gpus, without, weights=weights)
    problem.quantile_offset_db(quantile, 0.0)  # refused before the work starts
    solved = solve_problem(problem)
    points = []
    for index in range(len(solved)):
        steps, latency, error = solved.steps(index), float(solved.latency_s[index]), float(solved.error[index])
        psnr = None if math.isinf(problem.psnr_db(error)) else problem.psnr_db(error)
        points.append(FrontierPoint(
            latency_s=latency, error=error, psnr_db=psnr, speedup=problem.single_s / latency,
            ideal_speedup=problem.ideal_speedup(steps), work_speedup=problem.work_speedup(steps),
            psnr_quantile_db=None if psnr is None or quantile is None else problem.judged_db(error, quantile),
            steps=steps,
        ))
    return points


def plan_for_steps(
    problem: Problem, steps: Sequence[str], ranks: tuple[RankSpec, ...], target: str, *,
    quantile: float | None = None, certificate: Certificate | None = None, source: Profile | None = None,
) -> Plan:
    """A plan with a fixed schedule, its predictions filled in; `source` is the profile as measured."""
    exact = problem.exact_of(steps)
    used = [problem.by_name[name] for name in dict.fromkeys((*steps, exact))]
    schedule = FixedSchedule(steps=tuple(steps))
    predictions = problem.predict(steps, target, quantile)
    return make_plan(problem, used, schedule, ranks, predictions, exact=exact, certificate=certificate, source=source)


def _exact_plan(problem: Problem, ranks: tuple[RankSpec, ...], target: str, source: Profile) -> Plan:
    """The fastest exact pattern at every step, of those that fit if there are any."""
    each = sorted(
        reversed([p for p in problem.patterns if p.is_exact]), key=lambda p: problem.costs[p.name].latency_s
    )
    roomy = [p for p in each if fits(peaks_of(problem, ranks, [p]), ranks)]
    return plan_for_steps(problem, ((roomy or each)[0].name,) * problem.profile.num_steps, ranks, target, source=source)


def _paper_plan(
    profile: Profile, gpus: int, without: Iterable[str], ranks: tuple[RankSpec, ...], target: str, source: Profile
) -> Plan:
    problem = Problem(profile, gpus, without, ranks=ranks)
    if "paper" in problem.excluded:
        raise UsageError("the policy 'paper' cannot do without the family 'paper'; drop one of the two")
    window = paper_window(profile, gpus)
    problem = Problem(profile, gpus, without, extra=(window,), ranks=ranks)
    schedule = paper_schedule(profile, problem.exact.name, window.name)
    typical = schedule.resolve(profile.guidance.mean if profile.guidance is not None else ())
    predictions = problem.predict(typical.steps, target)
    return make_plan(problem, [problem.exact, window], schedule, ranks, predictions, source=source)


def make_plan(
    problem: Problem, patterns: Sequence[Pattern], schedule: Schedule, ranks: tuple[RankSpec, ...],
    predictions: Predictions, *, exact: str | None = None, certificate: Certificate | None = None,
    source: Profile | None = None,
) -> Plan:
    """A plan of the problem's model with these tables; `exact`: for calls that it does not cover, default the
    problem's."""
    profile = problem.profile
    names = dict.fromkeys(pattern.partition for pattern in patterns if pattern.partition != WHOLE)
    partitions = tuple(profile.partition(name) for name in names)
    peaks = peaks_of(problem, ranks, patterns)
    return Plan(
        weights="stages" if problem.weights == "stages" else "whole",
        model=profile.model, ranks=ranks, partitions=partitions, patterns=tuple(patterns),
        exact=exact or problem.exact.name,
        schedule=schedule, predictions=predictions.model_copy(update={"peak_bytes": peaks}), certificate=certificate,
        provenance=PlanProvenance(
            created=datetime.now(UTC).isoformat(timespec="seconds"), profile_sha256=(source or profile).digest(),
            versions=installed_versions("hybridiff-compiler", "numpy"),
        ),
    )


def solve_problem(problem: Problem, *, exact_head: int = 1) -> Frontier:
    """The frontier over the candidates that no other beats; the first `exact_head` steps are exact.

    Raises:
        InputError: the profile has no pattern errors.
    """
    if not problem.profile.errors:
        raise InputError(
            "the profile holds no pattern errors, so image quality cannot be predicted; use the policy 'exact' or "
            "'paper', or profile the model again with trained weights and prompts"
        )
    return solve_frontier(prune_dominated(problem.tables), problem.profile.num_steps, exact_head=exact_head)


def _device(profile: Profile, device: str | None) -> Device:
    if device is None:
        return profile.provenance.device_type
    if device == "cpu" or device == "cuda":
        return "cpu" if device == "cpu" else "cuda"
    raise UsageError(f"got device {device!r}; choose cpu or cuda")


def _ranks(
    device: Device, gpus: int, speeds: Sequence[float] | None, memory_bytes: Sequence[int | None] | int | None
) -> tuple[RankSpec, ...]:
    each = (1.0,) * gpus if speeds is None else tuple(speeds)
    if len(each) != gpus or not all(math.isfinite(speed) and speed > 0 for speed in each):
        raise UsageError(f"got speeds {list(each)} for {gpus} GPUs; give one above 0 for each, rank 0 first")
    limits = tuple(memory_bytes) if isinstance(memory_bytes, Sequence) else (memory_bytes,) * gpus
    if len(limits) != gpus or not all(limit is None or (isinstance(limit, int) and limit > 0) for limit in limits):
        raise UsageError(
            f"got memory_bytes {list(limits)} for {gpus} GPUs; give one whole number of bytes above 0 for all of them, "
            "or one for each, rank 0 first"
        )
    return tuple(RankSpec(device=device, speed=speed, memory_bytes=limit) for speed, limit in zip(each, limits))
