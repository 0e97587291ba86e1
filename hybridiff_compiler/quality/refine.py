"""Improving a schedule by measurement: where predictions are too coarse to tell good schedules from better ones.

A hill climb over schedules that cost no more. A move brings an exact step one or two steps forward or back, or gives
the free steps between two exact ones, or one of them, another pattern that computes nothing; one or two moves at a time
are kept where the mean PSNR over the prompts rises. What comes out must be measured on other prompts: it was chosen for
these.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..ir import FixedSchedule, InputError, Plan, PlanMismatchError, Profile, UsageError, check_reads
from ..planner import at_steps
from ..planner.problem import Problem
from .coverage import check_covered
from .equal_cost import EqualCostRow, Judge, unmeasured_free

__all__ = ["refine", "refine_plan"]

_REACH = 2
"""Steps that an exact step is moved by, at most."""


def refine_plan(
    plan: Plan, profile: Profile, pipe: Any, *, prompts: Sequence[str], tries: int = 150,
    seconds: float = math.inf, guidance_scale: float | None = None, seed: int = 0, batch: int = 16,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None, **options: Any,
) -> Plan:
    """A plan whose schedule was improved by measurement, at no more predicted latency and no more work.

    Args:
        plan: with a fixed schedule, solved from `profile`.
        profile: as measured.
        pipe: the pipeline, in the plan's dtype.
        prompts: what the schedule is fitted to; judge it by others. A dozen or more.
        tries: schedules to measure.
        seconds: after which no further schedule is tried.
        guidance_scale: default: the profile's.
        seed: of the moves; prompt k starts from `seed + k`.
        batch: prompts simulated together.
        on_progress: called with (stage, done, total).
        **options: further keyword arguments of the pipeline call.

    Raises:
        UsageError: the plan switches between schedules, or there are no prompts.
        InputError: the plan holds patterns that the profile does not know.
        PlanMismatchError: plan, profile and the pipeline's calls are not of one denoiser and size.
    """
    if not isinstance(plan.schedule, FixedSchedule):
        raise UsageError(f"got a plan with a schedule of kind {plan.schedule.kind!r}; only fixed ones can be refined")
    if not prompts:
        raise UsageError("got no prompts to refine for; give a dozen or more")
    if plan.weights != "whole":
        raise UsageError("got a plan of stage-only weights; only plans of whole weights can be refined")
    if profile.model.fingerprint != plan.model.fingerprint:
        raise PlanMismatchError(
            f"the plan is for {plan.model.name} (layer graph {plan.model.fingerprint[:12]}), the profile for "
            f"{profile.model.name} ({profile.model.fingerprint[:12]}); give the profile that it was made from"
        )
    known = at_steps(profile, plan.num_steps)
    problem = Problem(known, plan.world_size, ranks=plan.ranks, extra=unmeasured_free(profile))
    unknown = sorted({*plan.schedule.steps} - problem.by_name.keys())
    if unknown:
        raise InputError(
            f"the profile knows no pattern {unknown[0]!r} of the plan; give the profile that the plan was made from"
        )
    judge = Judge(
        pipe, profile, num_steps=plan.num_steps, gpus=plan.world_size, prompts=prompts, batch=batch,
        guidance_scale=guidance_scale, options=options, seed=seed,
    )
    check_covered(judge.generation, plan, prompts[0])
    steps = plan.schedule.steps
    limit = problem.latency_s(steps) * (1 + 1e-9)
    found = refine(
        judge, judge.row("start", judge.work_speedup(steps), steps), tries=tries, seconds=seconds, seed=seed,
        patterns=[pattern.name for pattern in judge.free_patterns],
        allowed=lambda tried: problem.latency_s(tried) <= limit,
        on_progress=lambda done, total, best: on_progress(f"refining, {best:.1f} dB", done, total),
    )
    asked = ", ".join(filter(None, [
        plan.predictions.target, f"refined to {found.psnr_db:.1f} dB on {len(prompts)} prompts",
    ]))
    used = {pattern.name: pattern for pattern in plan.patterns}
    used.update({name: problem.by_name[name] for name in found.steps if name not in used})
    fields: Mapping[str, Any] = dict(plan)
    return Plan(**{
        **fields, "patterns": tuple(used.values()), "schedule": FixedSchedule(steps=found.steps), "certificate": None,
        "predictions": problem.predict(found.steps, asked).model_copy(
            update={"peak_bytes": plan.predictions.peak_bytes}
        ),
    })


def refine(
    judge: Judge, row: EqualCostRow, *, patterns: Sequence[str], tries: int, seconds: float = math.inf, seed: int = 0,
    allowed: Callable[[Sequence[str]], bool] = lambda steps: True,
    on_progress: Callable[[int, int, float], None] = lambda done, total, best: None,
) -> EqualCostRow:
    """The best schedule found near `row`, measured.

    Args:
        judge: measures; its prompts are what the schedule is fitted to.
        row: where to start; its work, or its budget where that is more, is kept to.
        patterns: without units, that free steps may run.
        tries: schedules to measure.
        seconds: after which no further one is tried.
        seed: of the moves.
        allowed: what else a schedule must hold to.
        on_progress: called with (schedules measured, tries, best mean PSNR in dB).
    """
    rng = random.Random(seed)
    best, level = row, statistics.fmean(judge.measure(row))
    least = min(row.budget, judge.work_speedup(row.steps)) * (1 - 1e-9)
    seen = {row.steps}
    done = idle = 0
    end = time.monotonic() + seconds
    while done < tries and idle < 100 * tries and time.monotonic() < end:
        steps = best.steps
        for _ in range(rng.choice((1, 1, 2))):
            steps = _moved(steps, judge.exact, patterns, rng)
        idle += 1
        if steps in seen or not _runs(judge, steps) or judge.work_speedup(steps) < least or not allowed(steps):
            continue
        seen.add(steps)
        done += 1
        candidate = replace(best, steps=steps, work_speedup=judge.work_speedup(steps))
        value = statistics.fmean(judge.measure(candidate))
        if value > level:
            best, level = candidate, value
        on_progress(done, tries, level)
    predicted = judge.predicted_db(best.steps)
    return judge.measured(replace(best, name="refined", predicted_db=predicted))


def _moved(steps: tuple[str, ...], exact: str, patterns: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    changed = list(steps)
    borders = [i for i, name in enumerate(steps) if name == exact]
    chance = rng.random()
    if chance < 0.55 and len(borders) > 1:
        first = rng.choice(borders[1:])
        second = first + rng.choice([d for d in range(-_REACH, _REACH + 1) if d])
        if 1 <= second < len(steps):
            changed[first], changed[second] = changed[second], changed[first]
        return tuple(changed)
    if chance < 0.85:
        number = rng.randrange(len(borders))
        chosen = range(borders[number] + 1, [*borders, len(steps)][number + 1])
    else:
        first = rng.randrange(1, len(steps))
        chosen = range(first, first + 1)
    name = rng.choice(patterns)
    for step in chosen:
        if changed[step] in patterns:
            changed[step] = name
    return tuple(changed)


def _runs(judge: Judge, steps: tuple[str, ...]) -> bool:
    try:
        check_reads([judge.pattern(name) for name in steps])
    except InputError:
        return False
    return math.isfinite(judge.work_speedup(steps))
