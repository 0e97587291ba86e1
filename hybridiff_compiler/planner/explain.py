"""Why a plan is as it is: what its cheap steps buy and cost, what holds it back, and what a little more would buy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ..ir import FixedSchedule, Plan, PlanMismatchError, Profile, RankSpec, UsageError
from .fitting import fits, peaks_of_steps
from .problem import Problem
from .rescale import at_steps
from .solve import solve_problem
from .target import Target
from .work import in_work_units

__all__ = ["CheapRun", "Explanation", "Trade", "explain", "target_of"]

_SLACK = 1e-6


@dataclass(frozen=True, kw_only=True)
class CheapRun:
    """Neighbouring steps that are not exact."""

    start: int
    stop: int
    """First step after the run."""
    patterns: dict[str, int]
    """How many steps run which pattern."""
    saved_ms: float
    """What the loop would take longer if these steps were exact."""
    cost_db: float | None
    """By how much the predicted PSNR would rise then; None where the plan would be exact."""
    error_share: float
    """Part of the summed error that would go, what later steps save by fresher values included."""


@dataclass(frozen=True, kw_only=True)
class Trade:
    """A neighbour on the frontier."""

    what: str
    """E.g. `1 dB more`."""
    latency_ms: float
    """Of the neighbour."""
    psnr_db: float | None
    """Of the neighbour; None where it is exact."""
    delta_ms: float
    delta_db: float | None
    """Neighbour minus plan."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All of it."""

    latency_ms: float
    psnr_db: float | None
    runs: tuple[CheapRun, ...]
    binding: str
    """The constraint that stops the plan from being better, in words."""
    trades: tuple[Trade, ...]


def explain(profile: Profile, plan: Plan) -> Explanation:
    """Explain a fixed schedule, or of another kind the one that the profile's mean discrepancy leads to.

    All milliseconds are of the profile's measured costs, also where the plan was solved for work. Neighbours are
    schedules that the ranks of the plan can run: within their memory, and with weights of their own stages if it has
    those.

    Raises:
        PlanMismatchError: the plan is for another denoiser.
        InputError: the profile has no pattern errors.
    """
    if profile.model.fingerprint != plan.model.fingerprint:
        raise PlanMismatchError(
            f"the plan is for {plan.model.name} (layer graph {plan.model.fingerprint[:12]}), the profile for "
            f"{profile.model.name} ({profile.model.fingerprint[:12]}); give the profile that it was made from"
        )
    target, words = target_of(plan)
    scaled = at_steps(profile, int(words.get("steps", profile.num_steps)), strength=float(words.get("strength", 1)))
    if scaled.num_steps != plan.num_steps:
        scaled = at_steps(profile, plan.num_steps)
    problem = Problem(scaled, plan.world_size, extra=plan.patterns, ranks=plan.ranks, weights=plan.weights)
    curve = scaled.guidance.mean if scaled.guidance is not None else ()
    schedule = plan.schedule if isinstance(plan.schedule, FixedSchedule) else plan.schedule.resolve(curve)
    without = [word for word in words.get("without", "").split(",") if word]
    costed = in_work_units(scaled) if words.get("costs") == "work" else scaled
    neighbours = _neighbours(
        problem, Problem(costed, plan.world_size, without, ranks=plan.ranks, weights=plan.weights), plan.ranks
    )
    steps = schedule.steps
    latency, error = problem.latency_s(steps), problem.error(steps)
    if target is None or target.policy is not None or error is None:
        binding = "none: the schedule was not solved for a target"
    elif target.min_psnr is not None:
        binding = _quality(problem, neighbours, target, latency, error)
    else:
        binding = _budget(
            Problem(costed, plan.world_size, extra=plan.patterns, ranks=plan.ranks, weights=plan.weights),
            neighbours, target, steps, error, in_work=costed is not scaled,
        )
    return Explanation(
        latency_ms=1e3 * latency, psnr_db=_db(problem, error), runs=_runs(problem, steps), binding=binding,
        trades=_trades(problem, neighbours, latency, error),
    )


@dataclass(frozen=True)
class _Neighbour:
    """A point of the frontier that fits the ranks."""

    solved_s: float
    """Latency as it was solved for: seconds or evaluations."""
    latency_s: float
    """By measured costs."""
    error: float


def _neighbours(problem: Problem, costed: Problem, ranks: Sequence[RankSpec]) -> list[_Neighbour]:
    """Fastest first. `problem` has the measured costs, `costed` those that were solved for."""
    solved = solve_problem(costed)
    limited = any(rank.memory_bytes is not None for rank in ranks)
    fitting: dict[frozenset[str], bool] = {}
    found = []
    for point in range(len(solved)):
        steps = solved.steps(point)
        names = frozenset(steps)
        if limited and names not in fitting:
            fitting[names] = fits(peaks_of_steps(problem, ranks, steps), ranks)
        if fitting.get(names, True):
            found.append(
                _Neighbour(float(solved.latency_s[point]), problem.latency_s(steps), float(solved.error[point]))
            )
    return found


def target_of(plan: Plan) -> tuple[Target | None, dict[str, str]]:
    """The target that a plan was solved for, and all words of `Predictions.target`; None for hand-made plans."""
    words = dict(word.split("=", 1) for word in plan.predictions.target.split() if "=" in word)
    try:
        return Target(
            policy=words.get("policy"),
            **{name: float(words[name]) for name in ("min_psnr", "speedup", "max_latency_ms", "quantile")
               if name in words},
        ), words
    except (UsageError, ValueError):
        return None, words


def _db(problem: Problem, error: float | None) -> float | None:
    if error is None:
        return None
    psnr = problem.psnr_db(error)
    return None if math.isinf(psnr) else psnr


def _runs(problem: Problem, steps: tuple[str, ...]) -> tuple[CheapRun, ...]:
    exact, total = problem.exact_of(steps), problem.error(steps)
    runs, start = [], 0
    for is_exact, group in groupby(steps, key=lambda name: problem.by_name[name].is_exact):
        names = list(group)
        stop = start + len(names)
        if not is_exact:
            repaired = (*steps[:start], *(exact,) * len(names), *steps[stop:])
            left = problem.error(repaired)
            before, after = _db(problem, total), _db(problem, left)
            runs.append(CheapRun(
                start=start, stop=stop, patterns=dict(Counter(names)),
                saved_ms=1e3 * (problem.latency_s(repaired) - problem.latency_s(steps)),
                cost_db=None if before is None or after is None else after - before,
                error_share=(total - left) / total if total and left is not None else 0.0,
            ))
        start = stop
    return tuple(runs)


def _quality(
    problem: Problem, neighbours: Sequence[_Neighbour], target: Target, latency: float, error: float
) -> str:
    faster = [each for each in neighbours if each.latency_s < latency * (1 - _SLACK)]
    if not faster:
        return "none: no schedule is faster"
    best = min(faster, key=lambda each: each.error)
    judged = problem.judged_db(best.error, target.quantile)
    of = "mean" if target.quantile is None else f"{target.quantile:g} quantile"
    return (
        f"quality: {target.min_psnr:g} dB asked for, with {problem.reserve_db(target.quantile):.2f} dB in reserve; "
        f"predicted {problem.judged_db(error, target.quantile):.2f} dB ({of}), the next faster schedule "
        f"{judged:.2f} dB ({1e3 * (latency - best.latency_s):.2f} ms less)"
    )


def _budget(
    costed: Problem, neighbours: Sequence[_Neighbour], target: Target, steps: Sequence[str], error: float, *,
    in_work: bool,
) -> str:
    budget = target.budget_s(costed)
    assert budget is not None, "a target has a quality or a latency"
    better = [each for each in neighbours if each.error < error * (1 - _SLACK)]
    if not better:
        return "none: no schedule is better"
    nearest = min(better, key=lambda each: each.solved_s)
    psnr = _db(costed, nearest.error)

    def amount(value: float) -> str:
        return f"{value:.2f} evaluations" if in_work else f"{1e3 * value:.2f} ms"

    return (
        f"{'work' if in_work else 'latency'}: {amount(budget)} allowed, predicted {amount(costed.latency_s(steps))}; "
        f"the next better schedule takes {amount(nearest.solved_s)} ({'exact' if psnr is None else f'{psnr:.2f} dB'})"
    )


def _trades(
    problem: Problem, neighbours: Sequence[_Neighbour], latency: float, error: float | None
) -> tuple[Trade, ...]:
    own = _db(problem, error)
    trades = []

    def add(what: str, found: _Neighbour) -> None:
        psnr = _db(problem, found.error)
        trades.append(Trade(
            what=what, latency_ms=1e3 * found.latency_s, psnr_db=psnr, delta_ms=1e3 * (found.latency_s - latency),
            delta_db=None if psnr is None or own is None else psnr - own,
        ))

    if own is not None:
        for db in (1, -1):
            good = [each for each in neighbours if problem.psnr_db(each.error) >= own + db]
            if good:
                add(f"{abs(db)} dB {'more' if db > 0 else 'less'}", min(good, key=lambda each: each.latency_s))
    for ms in (10, -10):
        quick = [each for each in neighbours if each.latency_s <= latency + ms / 1e3 + _SLACK * latency]
        if quick:
            add(f"{abs(ms)} ms {'more' if ms > 0 else 'less'}", min(quick, key=lambda each: each.error))
    return tuple(trades)
