"""From a profile and a target to a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from ..ir import (
    WHOLE,
    FixedSchedule,
    InputError,
    Pattern,
    Plan,
    PlanProvenance,
    Predictions,
    Profile,
    RankSpec,
    Schedule,
    TargetError,
    UsageError,
)
from ..ir.versions import installed_versions
from .policy import paper_schedule, paper_window
from .problem import Problem
from .schedule import Frontier, solve_frontier
from .tables import prune_dominated
from .worlds import check_gpus

__all__ = ["POLICIES", "FrontierPoint", "frontier", "plan", "plan_for_steps", "solve_problem"]

Policy = Literal["exact", "paper"]
Device = Literal["cpu", "cuda"]
POLICIES: tuple[Policy, ...] = ("exact", "paper")
_TOLERANCE = 1e-9


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
    steps: tuple[str, ...]


def plan(
    profile: Profile,
    *,
    gpus: int = 2,
    min_psnr: float | None = None,
    speedup: float | None = None,
    policy: str | None = None,
    without: Iterable[str] = (),
    device: str | None = None,
) -> Plan:
    """The best plan for a target.

    Args:
        profile: measurements of one denoiser.
        gpus: ranks, 1 or 2.
        min_psnr: lowest mean PSNR in dB, fastest schedule wins; `Compounding.reserve_db` is kept in reserve.
        speedup: predicted speed-up over one rank to reach, least error wins.
        policy: `exact` (every step exact) or `paper` (the published adaptive rule). Exactly one target is given.
        without: families of patterns not to use, e.g. `reuse`.
        device: `cpu` or `cuda`; default: where the profile was measured.

    Raises:
        UsageError: none or several targets, or an argument out of range.
        TargetError: no schedule is so fast; the message names the fastest.
        InputError: the profile lacks the measurements that the target needs.
    """
    target = _check_target(min_psnr, speedup, policy)
    check_gpus(gpus)
    ranks = (RankSpec(device=_device(profile, device)),) * gpus
    if policy == "paper":
        return _paper_plan(profile, gpus, without, ranks, target)
    problem = Problem(profile, gpus, without)
    if policy == "exact":
        return plan_for_steps(problem, (problem.exact.name,) * profile.num_steps, ranks, target)
    solved = solve_problem(problem)
    if min_psnr is not None:
        point = _fastest_at(problem, solved, min_psnr + profile.compounding.reserve_db)
    else:
        assert speedup is not None, "one target is given"
        point = _best_within(problem, solved, speedup)
    return plan_for_steps(problem, solved.steps(point), ranks, target)


def frontier(profile: Profile, gpus: int = 2, without: Iterable[str] = ()) -> list[FrontierPoint]:
    """Every Pareto-optimal trade of predicted latency against predicted error, fastest first.

    Raises:
        UsageError: `gpus` is not 1 or 2, or `without` names an unknown family.
        InputError: the profile has no pattern errors.
    """
    problem = Problem(profile, gpus, without)
    solved = solve_problem(problem)
    points = []
    for index in range(len(solved)):
        steps, latency, error = solved.steps(index), float(solved.latency_s[index]), float(solved.error[index])
        psnr = problem.psnr_db(error)
        points.append(FrontierPoint(
            latency_s=latency, error=error, psnr_db=None if math.isinf(psnr) else psnr,
            speedup=problem.single_s / latency, ideal_speedup=problem.ideal_speedup(steps), steps=steps,
        ))
    return points


def plan_for_steps(problem: Problem, steps: Sequence[str], ranks: tuple[RankSpec, ...], target: str) -> Plan:
    """A plan with a fixed schedule, its predictions filled in."""
    used = [problem.by_name[name] for name in dict.fromkeys((*steps, problem.exact.name))]
    schedule = FixedSchedule(steps=tuple(steps))
    return _make_plan(problem, used, schedule, ranks, problem.predict(steps, target))


def _paper_plan(
    profile: Profile, gpus: int, without: Iterable[str], ranks: tuple[RankSpec, ...], target: str
) -> Plan:
    problem = Problem(profile, gpus, without)
    if "paper" in problem.excluded:
        raise UsageError("the policy 'paper' cannot do without the family 'paper'; drop one of the two")
    window = paper_window(profile, gpus)
    problem = Problem(profile, gpus, without, extra=(window,))
    schedule = paper_schedule(profile, problem.exact.name, window.name)
    typical = schedule.resolve(profile.guidance.mean if profile.guidance is not None else ())
    predictions = problem.predict(typical.steps, target)
    return _make_plan(problem, [problem.exact, window], schedule, ranks, predictions)


def _make_plan(
    problem: Problem, patterns: Sequence[Pattern], schedule: Schedule, ranks: tuple[RankSpec, ...],
    predictions: Predictions,
) -> Plan:
    profile = problem.profile
    partitions = dict.fromkeys(pattern.partition for pattern in patterns if pattern.partition != WHOLE)
    return Plan(
        model=profile.model, ranks=ranks, partitions=tuple(profile.partition(name) for name in partitions),
        patterns=tuple(patterns), exact=problem.exact.name, schedule=schedule, predictions=predictions,
        provenance=PlanProvenance(
            created=datetime.now(UTC).isoformat(timespec="seconds"), profile_sha256=profile.digest(),
            versions=installed_versions("hybridiff-compiler", "numpy"),
        ),
    )


def solve_problem(problem: Problem) -> Frontier:
    """The frontier over the candidates that no other beats.

    Raises:
        InputError: the profile has no pattern errors.
    """
    if not problem.profile.errors:
        raise InputError(
            "the profile holds no pattern errors, so image quality cannot be predicted; use the policy 'exact' or "
            "'paper', or profile the model again with trained weights and prompts"
        )
    return solve_frontier(prune_dominated(problem.tables), problem.profile.num_steps)


def _fastest_at(problem: Problem, solved: Frontier, psnr_db: float) -> int:
    """The first point whose predicted PSNR suffices; the exact schedule always does."""
    return next(i for i in range(len(solved)) if problem.psnr_db(float(solved.error[i])) >= psnr_db - _TOLERANCE)


def _best_within(problem: Problem, solved: Frontier, speedup: float) -> int:
    """The last point (least error) that is fast enough."""
    budget = problem.single_s / speedup * (1 + _TOLERANCE)
    fast = [i for i in range(len(solved)) if solved.latency_s[i] <= budget]
    if not fast:
        best = problem.single_s / float(solved.latency_s[0])
        raise TargetError(
            f"no schedule on {problem.gpus} GPU{'s' if problem.gpus > 1 else ''} is predicted to be {speedup:g}x as "
            f"fast as one; the fastest reaches {math.floor(best * 100) / 100:.2f}x at "
            f"{problem.psnr_db(float(solved.error[0])):.1f} dB; ask for less or allow more patterns"
        )
    return fast[-1]


def _check_target(min_psnr: float | None, speedup: float | None, policy: str | None) -> str:
    given = {name: value for name, value in (("min_psnr", min_psnr), ("speedup", speedup), ("policy", policy))
             if value is not None}
    if len(given) != 1:
        got = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
        raise UsageError(f"got targets: {got}; give exactly one of min_psnr, speedup and policy")
    if policy is not None and policy not in POLICIES:
        raise UsageError(f"got policy {policy!r}; choose from {', '.join(POLICIES)}")
    if min_psnr is not None and not math.isfinite(min_psnr):
        raise UsageError(f"got min_psnr={min_psnr}; give a number of decibels, e.g. 35, or the policy 'exact'")
    if speedup is not None and not (math.isfinite(speedup) and speedup > 0):
        raise UsageError(f"got speedup={speedup}; give a factor above 0, e.g. 3")
    name, value = next(iter(given.items()))
    return f"{name}={value:g}" if isinstance(value, float | int) else f"{name}={value}"


def _device(profile: Profile, device: str | None) -> Device:
    if device is None:
        return profile.provenance.device_type
    if device == "cpu" or device == "cuda":
        return "cpu" if device == "cpu" else "cuda"
    raise UsageError(f"got device {device!r}; choose cpu or cuda")
