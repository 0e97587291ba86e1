"""Plans that pick a schedule per prompt: thresholds and schedules from measured prompts.

Model. How far one prompt's PSNR lies from the mean, its *offset*, is nearly the same for every schedule; it is taken
to be a straight line in a statistic of the discrepancy of the first steps (`SwitchedSchedule.value`) plus a normal
rest. Both are fitted to measured prompts (`PromptSamples`). Where the statistic explains the offset, prompts that are
known to be easy need less reserve, and the quantile asked for holds *within every group* of prompts, not only over all.

Objective: over contiguous groups of the measured prompts in order of the statistic, minimise the mean predicted
latency, each group running the fastest schedule whose PSNR, at the group's worst offset on the line and with the
quantile of the rest and the usual reserve off, reaches the target. Exact for a statistic by dynamic programming over
(number of groups, last prompt), O(choices x prompts^2), since a group's latency depends on its two ends alone. For a
target on the mean nothing is gained: the line is the same for all schedules, so every group would run the same one.

On the bundled models little is gained: the first steps' discrepancy explains 0 to 11 % of the offsets' variance on the
U-Net and 12 to 26 % on the MMDiT (tools/measure_prompts.py, 24 prompts), and at 35 dB for 95 % of the prompts the
MMDiT's plan is 1.3 % faster on average than the fixed one; elsewhere the fixed plan is returned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ..ir import (
    Document,
    FixedSchedule,
    InputError,
    Plan,
    PlanMismatchError,
    Predictions,
    Profile,
    RankSpec,
    Statistic,
    SwitchedSchedule,
    UsageError,
)
from .problem import Problem
from .rescale import at_steps
from .robust import quantile_reserve_db
from .schedule import Frontier
from .solve import make_plan, plan, solve_problem
from .target import Target
from .worlds import check_gpus

__all__ = ["MEASURED", "Line", "PromptSamples", "best_groups", "best_statistic", "fit_line", "switched_plan"]

MEASURED = (2, 4, 8)
"""Numbers of first steps that are tried; one more than that must be exact (see `SwitchedSchedule.decided_at`)."""
_STATISTICS: tuple[Statistic, ...] = ("mean", "last", "slope")
_LAG = 2
_LEAST_PROMPTS = 8


class PromptSamples(Document):
    """Measured prompts: their discrepancy curves, and the PSNR of some schedules on each."""

    kind: Literal["prompt-samples"] = "prompt-samples"
    schema_version: Literal[1] = 1
    fingerprint: str
    """Of the denoiser; see `ModelInfo.fingerprint`."""
    num_steps: int = Field(ge=1)
    prompts: tuple[str, ...] = Field(min_length=1)
    rel_mae: tuple[tuple[float, ...], ...]
    """`[prompt][step]` of the exact run."""
    schedules: tuple[str, ...] = Field(min_length=1)
    """Printable forms."""
    psnr_db: tuple[tuple[float, ...], ...]
    """`[schedule][prompt]`, of the final image against the exact run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        count = len(self.prompts)
        if len(self.rel_mae) != count or any(len(row) != self.num_steps for row in self.rel_mae):
            raise ValueError(f"rel_mae must have {count} prompts of {self.num_steps} steps")
        if len(self.psnr_db) != len(self.schedules) or any(len(row) != count for row in self.psnr_db):
            raise ValueError(f"psnr_db must have {len(self.schedules)} schedules of {count} prompts")
        return self

    @property
    def offsets_db(self) -> tuple[float, ...]:
        """Per prompt, how far its PSNR lies from the mean over prompts; mean over schedules."""
        table = np.asarray(self.psnr_db)
        return tuple((table - table.mean(axis=1, keepdims=True)).mean(axis=0).tolist())

    @property
    def unexplained_db(self) -> float:
        """Standard deviation of a prompt's offset between schedules."""
        table = np.asarray(self.psnr_db)
        rest = table - table.mean(axis=1, keepdims=True) - np.asarray(self.offsets_db)
        return float(np.sqrt((rest**2).sum() / max(1, (table.shape[0] - 1) * (table.shape[1] - 1))))


@dataclass(frozen=True)
class Line:
    """`offset = intercept + slope * value`, with normal residuals."""

    intercept: float
    slope: float
    std_db: float
    """Of the residuals, what schedules differ in for one prompt included."""
    explained: float
    """Share of the variance of the offsets that the line explains (R^2)."""

    def worst(self, low: float, high: float) -> float:
        """Least offset for values between two."""
        return self.intercept + min(self.slope * low, self.slope * high)


def fit_line(values: Sequence[float], offsets: Sequence[float], unexplained_db: float = 0.0) -> Line:
    """Least squares, residuals with two degrees of freedom less than prompts."""
    x, y = np.asarray(values, dtype=float), np.asarray(offsets, dtype=float)
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread > 0 else 0.0
    intercept = float(y.mean() - slope * x.mean())
    rest = float(((y - intercept - slope * x) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    std = math.sqrt(rest / max(1, len(x) - 2) + unexplained_db**2)
    return Line(intercept, slope, std, 1 - rest / total if total > 0 else 0.0)


def best_groups(latency: NDArray[np.float64], most: int) -> tuple[float, tuple[int, ...]]:
    """Divide prompts 0..n-1 into at most `most` contiguous groups of least total cost.

    Args:
        latency: `[i, j]`, seconds of one prompt of the group `[i, j)`; infinite where no schedule will do.
        most: groups.

    Returns:
        The mean latency per prompt (infinite when nothing will do) and where each group after the first begins.
    """
    count = len(latency) - 1
    size = np.arange(count + 1)
    many = size[None, :] - size[:, None]
    total = np.where(many > 0, latency, np.inf) * np.maximum(many, 1)
    best = np.full((most + 1, count + 1), np.inf)
    begin = np.zeros((most + 1, count + 1), dtype=int)
    best[0, 0] = 0.0
    for groups in range(1, most + 1):
        candidates = best[groups - 1][:, None] + total
        begin[groups], best[groups] = candidates.argmin(axis=0), candidates.min(axis=0)
    chosen = int(np.argmin(best[:, count]))
    if not math.isfinite(best[chosen, count]):
        return math.inf, ()
    cuts, end = [], count
    for groups in range(chosen, 1, -1):
        end = int(begin[groups, end])
        cuts.append(end)
    return float(best[chosen, count]) / count, tuple(reversed(cuts))


@dataclass(frozen=True)
class _Solution:
    latency_s: float
    schedule: SwitchedSchedule
    points: tuple[int, ...]
    shares: tuple[float, ...]
    solved: Frontier
    line: Line


def switched_plan(
    profile: Profile,
    samples: PromptSamples,
    *,
    gpus: int = 2,
    min_psnr: float | None = None,
    quantile: float | None = 0.05,
    choices: int = 3,
    num_inference_steps: int | None = None,
    strength: float = 1.0,
    without: Iterable[str] = (),
    costs: str = "measured",
    **other: object,
) -> Plan:
    """The plan of least mean latency that picks one of several schedules per prompt.

    It is returned where it is predicted to be faster on average than the one schedule that `plan` finds for the same
    target; otherwise that one is. Its predictions are means over the measured prompts.

    Args:
        profile: measurements of one denoiser.
        samples: measured prompts of the same denoiser and number of steps, 8 or more.
        gpus: ranks.
        min_psnr: what all but a share of `quantile` of the prompts of every group must reach, in dB.
        quantile: see above; None is 0.05.
        choices: most schedules in the plan.
        num_inference_steps, strength, without: as for `plan`.
        costs: `measured`.
        **other: further targets of `plan`, which are refused.

    Raises:
        UsageError: no `min_psnr`, another target, or an argument out of range.
        PlanMismatchError: the samples are for another denoiser or number of steps.
        InputError: too few prompts were measured.
    """
    quantile = 0.05 if quantile is None else quantile
    if min_psnr is None or any(value is not None for value in other.values()) or costs != "measured":
        raise UsageError("an adaptive plan is solved for min_psnr (with a quantile) and measured costs alone")
    if choices < 2:
        raise UsageError(f"got choices={choices}; an adaptive plan has 2 or more")
    target = Target(min_psnr=min_psnr, quantile=quantile)
    check_gpus(gpus)
    without = (without,) if isinstance(without, str) else tuple(without)
    scaled = at_steps(profile, num_inference_steps, strength=strength)
    _check_samples(samples, scaled)
    problem = Problem(scaled, gpus, without)
    found = [_solve(problem, samples, measured, target, choices) for measured in MEASURED
             if measured + _LAG < scaled.num_steps]
    usable = [solution for solution in found if solution is not None]
    fixed = plan(
        profile, gpus=gpus, min_psnr=min_psnr, quantile=quantile, num_inference_steps=num_inference_steps,
        strength=strength, without=without,
    )
    alone = fixed.predictions.latency_s
    assert alone is not None, "plans that were just solved are predicted"
    if not usable or min(solution.latency_s for solution in usable) >= alone:
        return fixed
    best = min(usable, key=lambda solution: solution.latency_s)
    return _plan(problem, best, fixed.ranks, target, profile)


def _check_samples(samples: PromptSamples, profile: Profile) -> None:
    if samples.fingerprint != profile.model.fingerprint or samples.num_steps != profile.num_steps:
        raise PlanMismatchError(
            f"the samples are for layer graph {samples.fingerprint[:12]} at {samples.num_steps} steps, the plan is for "
            f"{profile.model.fingerprint[:12]} at {profile.num_steps}; measure prompts of this model at these steps"
        )
    if len(samples.prompts) < _LEAST_PROMPTS:
        raise InputError(
            f"{len(samples.prompts)} prompts were measured; thresholds need {_LEAST_PROMPTS} or more to be fitted"
        )


def _solve(
    problem: Problem, samples: PromptSamples, measured: int, target: Target, choices: int
) -> _Solution | None:
    assert target.min_psnr is not None, "checked by the caller"
    assert target.quantile is not None, "set by the caller"
    statistic, values, line = best_statistic(samples, measured)
    order = np.argsort(values, kind="stable")
    ordered = np.asarray(values)[order]
    edges = np.concatenate([ordered[:1], (ordered[1:] + ordered[:-1]) / 2, ordered[-1:]])
    solved = solve_problem(problem, exact_head=measured - 1 + _LAG)
    z, count = NormalDist().inv_cdf(target.quantile), len(values)
    rest = problem.profile.compounding.model_copy(update={"prompt_std_db": line.std_db, "prompts": count})
    reserve = quantile_reserve_db(rest, target.quantile)
    needed = target.min_psnr + reserve - z * line.std_db
    quality = np.array([problem.psnr_db(float(error)) for error in solved.error])
    pick = np.full((count + 1, count + 1), -1)
    latency = np.full((count + 1, count + 1), np.inf)
    for i in range(count):
        for j in range(i + 1, count + 1):
            if edges[i] == edges[j] and count > 1:
                continue
            good = np.flatnonzero(quality >= needed - line.worst(edges[i], edges[j]))
            if len(good):
                pick[i, j], latency[i, j] = good[0], solved.latency_s[good[0]]
    mean, cuts = best_groups(latency, choices)
    if not math.isfinite(mean):
        return None
    ends = (0, *cuts, count)
    points = tuple(int(pick[i, j]) for i, j in pairwise(ends))
    schedule = SwitchedSchedule(
        choices=tuple(FixedSchedule(steps=solved.steps(point)) for point in points),
        thresholds=tuple(float(edges[cut]) for cut in cuts), measured=measured, statistic=statistic, lag=_LAG,
    )
    shares = tuple((j - i) / count for i, j in pairwise(ends))
    return _Solution(mean, schedule, points, shares, solved, line)


def best_statistic(samples: PromptSamples, measured: int) -> tuple[Statistic, list[float], Line]:
    """The statistic that explains most of the offsets."""
    found: list[tuple[Statistic, list[float], Line]] = []
    for statistic in _STATISTICS:
        rule = SwitchedSchedule(
            choices=(FixedSchedule(steps=("exact",) * samples.num_steps),), measured=measured, statistic=statistic
        )
        values = [rule.value(row) for row in samples.rel_mae]
        found.append((statistic, values, fit_line(values, samples.offsets_db, samples.unexplained_db)))
    return max(found, key=lambda item: item[2].explained)


def _plan(
    problem: Problem, best: _Solution, ranks: tuple[RankSpec, ...], target: Target, profile: Profile
) -> Plan:
    assert target.quantile is not None, "set by the caller"
    names = dict.fromkeys((*best.schedule.patterns, problem.exact.name))
    each = [problem.predict(choice.steps, quantile=target.quantile) for choice in best.schedule.choices]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return math.fsum(s * v for s, v in zip(best.shares, known)) if len(known) == len(values) else None

    latency = mean([p.latency_s for p in each])
    ideal, work = (
        mean([None if not value else 1 / value for value in values])
        for values in ([p.ideal_speedup for p in each], [p.work_speedup for p in each])
    )
    predictions = Predictions(
        latency_s=latency, single_s=problem.single_s, speedup=None if not latency else problem.single_s / latency,
        ideal_speedup=None if not ideal else 1 / ideal, work_speedup=None if not work else 1 / work,
        psnr_db=mean([p.psnr_db for p in each]), quantile=target.quantile, psnr_quantile_db=target.min_psnr,
        target=f"{target} adaptive explained={best.line.explained:.2f}",
    )
    return make_plan(
        problem, [problem.by_name[name] for name in names], best.schedule, ranks, predictions, source=profile
    )
