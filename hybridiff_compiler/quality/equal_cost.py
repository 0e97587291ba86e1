"""Planned schedules beside simpler ones of equal cost, independent of hardware.

Cost is denoiser evaluations on the critical path (`planner.work`), as a speed-up over one rank that spends two per
step. Every contender spends *at least* what the planned schedule may spend: of its possible sizes the cheapest that is
no cheaper than the budget. Quality is the PSNR of the final image against the exact run of the full number of steps
with the same seed, over prompts, from the single-device simulator.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ir import FixedSchedule, InputError, Partition, Pattern, Plan, PlanMismatchError, Profile, RankSpec, format_steps
from ..planner import (
    Problem,
    alternating_steps,
    at_steps,
    family_of,
    generate_patterns,
    in_work_units,
    solve_problem,
)
from ..planner.policy import paper_schedule, paper_window
from ..profiler.generate import Generation
from ..runtime.intercept import find_denoiser
from ..runtime.segments import SegmentRunner
from .measure import generate, simulate
from .metrics import psnr

__all__ = ["PIPES", "EqualCostRow", "Judge", "scheduler_levels", "use_scheduler", "with_noise_levels"]

PIPES = ("pipe", "branch-pipe")
"""Families that pipeline both branches asynchronously (AsyncDiff, Chen et al., NeurIPS 2024)."""
WARM_UPS = tuple(range(1, 10))
"""Exact first steps of the asynchronous pipeline, as AsyncDiff offers them."""
_CEILING_DB = 100.0


@dataclass(frozen=True, kw_only=True)
class EqualCostRow:
    """One way to spend a budget."""

    name: str
    budget: float
    """The speed-up that was asked for."""
    steps: tuple[str, ...]
    """Patterns of the steps; of `fewer steps` only as many as it takes."""
    work_speedup: float
    predicted_db: float | None = None
    psnr_db: float | None = None
    """Mean over prompts, each at most 100."""
    psnr_db_min: float | None = None
    per_prompt_db: tuple[float, ...] = field(default=(), repr=False)

    @property
    def schedule(self) -> str:
        """Printable form."""
        return format_steps(self.steps)


class Judge:
    """Makes and measures the rows of one model at one number of steps."""

    def __init__(
        self, pipe: Any, profile: Profile, *, num_steps: int | None = None,
        noise_levels: Sequence[float] | None = None, gpus: int = 2, without: Sequence[str] = (),
        prompts: Sequence[str] = (), batch: int = 8, guidance_scale: float | None = None,
        options: Mapping[str, Any] | None = None, seed: int = 0,
    ) -> None:
        """
        Args:
            pipe: the pipeline, in the profile's dtype; None where nothing is measured.
            profile: as measured.
            num_steps: default: the profile's.
            noise_levels: of these steps, where another scheduler runs them; see `at_steps`.
            gpus: ranks.
            without: families not to plan with.
            prompts: what to judge by.
            batch: prompts simulated together.
            guidance_scale: default: the profile's.
            options: further keyword arguments of the pipeline call.
            seed: prompt k starts from `seed + k`.
        """
        measured = at_steps(profile, num_steps, noise_levels=noise_levels)
        self.profile, self.gpus, self._without = in_work_units(measured), gpus, tuple(without)
        self._problem = Problem(self.profile, gpus, self._without, extra=_pipes(profile, gpus))
        self._everything = Problem(self.profile, gpus, extra=(*_pipes(profile, gpus), *unmeasured_free(profile)))
        self._solved = solve_problem(Problem(self.profile, gpus, self._without))
        self.prompts, self.batch = list(prompts), batch
        self.generation = Generation(
            pipe=pipe, num_inference_steps=measured.num_steps,
            guidance_scale=profile.guidance_scale if guidance_scale is None else guidance_scale, seed=seed,
            options=dict(options or {}),
        )
        self.runners: dict[int, SegmentRunner] = {}
        self._reference: Tensor | None = None
        self._known: dict[tuple[str, ...], list[float]] = {}

    @property
    def num_steps(self) -> int:
        """Steps of the full run."""
        return self.profile.num_steps

    @property
    def exact(self) -> str:
        """The exact pattern on these ranks."""
        return self._problem.exact.name

    @property
    def denoiser(self) -> nn.Module:
        """Of the pipeline."""
        return find_denoiser(self.generation.pipe)[1]

    def planned(self, speedup: float) -> EqualCostRow | None:
        """The schedule of least error within the budget; None when none is so fast."""
        budget = self._budget(speedup)
        quick = [i for i in range(len(self._solved)) if self._solved.latency_s[i] <= budget * (1 + 1e-9)]
        return self._row("planned", speedup, self._solved.steps(quick[-1])) if quick else None

    def contenders(self, speedup: float) -> Iterator[EqualCostRow]:
        """The simpler schedules of the same cost, as far as they reach it."""
        yield from self._papers(speedup)
        yield from self._asynchronous(speedup)
        yield from self._alternating(speedup)
        exact = self._problem.exact.name
        count = math.ceil(self._budget(speedup) / self._problem.work[exact] - 1e-9)
        if 1 <= count < self.num_steps:
            yield self._row("fewer steps", speedup, (exact,) * count)

    def measured(self, row: EqualCostRow) -> EqualCostRow:
        """The row with what its images show."""
        decibels = self.measure(row)
        return replace(
            row, psnr_db=statistics.fmean(decibels), psnr_db_min=min(decibels), per_prompt_db=tuple(decibels)
        )

    def measure(self, row: EqualCostRow) -> list[float]:
        """PSNR in dB per prompt.

        Raises:
            PlanMismatchError: the pipeline's calls are not those of the profile, so the schedule did not run.
        """
        if row.steps not in self._known:
            if self._reference is None:
                self._reference = self._plain(self.num_steps)
            if len(row.steps) < self.num_steps:
                images = self._plain(len(row.steps))
            else:
                images, executed = simulate(
                    self.generation, self.plan(row.steps), self.prompts, batch=self.batch, runners=self.runners
                )
                if any(steps != row.steps for steps in executed):
                    raise PlanMismatchError(
                        f"{row.name}: the calls of this pipeline are not covered by the profile "
                        f"({self.profile.model.name}, {self.profile.model.dtype}); load the model in that dtype and "
                        "at the profiled resolution"
                    )
            self._known[row.steps] = [min(value, _CEILING_DB) for value in psnr(images, self._reference)]
        return self._known[row.steps]

    def _plain(self, steps: int) -> Tensor:
        generation = replace(self.generation, num_inference_steps=steps)
        chunks = range(0, len(self.prompts), self.batch)
        return torch.cat([
            generate(generation, self.prompts[k : k + self.batch], first=k).images for k in chunks
        ])

    def plan(self, steps: tuple[str, ...]) -> Plan:
        """A plan that knows all tables and runs `steps`."""
        problem = self._everything
        return Plan(
            model=self.profile.model, ranks=(RankSpec(device=self.profile.provenance.device_type),) * self.gpus,
            partitions=self.profile.partitions, patterns=problem.patterns, exact=problem.exact.name,
            schedule=FixedSchedule(steps=steps),
        )

    @property
    def free_patterns(self) -> tuple[Pattern, ...]:
        """The tables that compute nothing."""
        return tuple(pattern for pattern in self._everything.patterns if not pattern.units)

    def row(self, name: str, speedup: float, steps: tuple[str, ...]) -> EqualCostRow:
        """A schedule of one's own, to be measured."""
        return self._row(name, speedup, steps)

    def pattern(self, name: str) -> Pattern:
        """The table called `name`."""
        return self._everything.by_name[name]

    def work_speedup(self, steps: Sequence[str]) -> float:
        """Evaluations of one rank over those of a schedule; infinite for one without any."""
        spent = math.fsum(self._everything.work[step] for step in steps)
        return self._problem.single_s / spent if spent else math.inf

    def predicted_db(self, steps: tuple[str, ...]) -> float | None:
        """Predicted mean PSNR of a schedule of all steps; None where it is exact or cannot be predicted."""
        error = self._everything.error(steps) if len(steps) == self.num_steps else None
        return None if error is None or error <= 0 else self._everything.psnr_db(error)

    def _budget(self, speedup: float) -> float:
        return self._problem.single_s / speedup

    def _row(self, name: str, speedup: float, steps: tuple[str, ...]) -> EqualCostRow:
        return EqualCostRow(
            name=name, budget=speedup, steps=steps, work_speedup=self.work_speedup(steps),
            predicted_db=self.predicted_db(steps),
        )

    def _papers(self, speedup: float) -> Iterator[EqualCostRow]:
        """The published rule's window where it starts on the mean curve, long enough for the budget (and started
        earlier where it would not fit); and the same window where its predicted error is least."""
        try:
            window = paper_window(self.profile, self.gpus).name
        except InputError:
            return
        if window not in self._everything.by_name:
            return
        exact, curve = self._problem.exact.name, self.profile.guidance
        saved = self._problem.work[exact] - self._everything.work[window]
        excess = self.num_steps * self._problem.work[exact] - self._budget(speedup)
        length = math.floor(excess / saved + 1e-9) if saved > 0 else self.num_steps
        if not 0 < length <= self.num_steps - 2:
            return
        rule = paper_schedule(self.profile, exact, window)
        found = rule.resolve(curve.mean if curve is not None else ()).steps.index(window) if rule.k else 1
        starts = range(1, self.num_steps - length)
        schedules = {
            start: (exact,) * start + (window,) * length + (exact,) * (self.num_steps - start - length)
            for start in starts
        }
        yield self._row("paper", speedup, schedules[min(found, starts[-1])])
        errors = {start: self._everything.error(steps) for start, steps in schedules.items()}
        known = {start: error for start, error in errors.items() if error is not None}
        if known:
            yield self._row("paper, best start", speedup, schedules[min(known, key=lambda start: known[start])])

    def _asynchronous(self, speedup: float) -> Iterator[EqualCostRow]:
        exact = self._problem.exact.name
        for pattern in self._everything.patterns:
            if family_of(pattern.name) not in PIPES:
                continue
            for warm_up in WARM_UPS:
                steps = (exact,) * warm_up + (pattern.name,) * (self.num_steps - warm_up)
                spent = math.fsum(self._everything.work[step] for step in steps)
                # Not adjustable: it is shown beside the budgets that it comes near to.
                if abs(self._problem.single_s / spent / speedup - 1) <= 0.15:
                    yield self._row(f"{pattern.name}, warm-up {warm_up}", speedup, steps)

    def _alternating(self, speedup: float) -> Iterator[EqualCostRow]:
        exact = self._problem.exact.name
        excess = self.num_steps * self._problem.work[exact] - self._budget(speedup)
        for pattern in self._everything.patterns:
            saved = self._problem.work[exact] - self._everything.work[pattern.name]
            if pattern.is_exact or saved <= 0 or family_of(pattern.name) in self._without:
                continue
            count, head = math.floor(excess / saved + 1e-9), int(pattern.trend > 0)  # a trend needs two exact steps
            if 0 < count <= self.num_steps - 2 - head:
                steps = (exact,) * head + alternating_steps(self.num_steps - head, count, exact, pattern.name)
                yield self._row(f"alternating {pattern.name}", speedup, steps)


def use_scheduler(pipe: Any, name: str | None) -> Callable[[int], tuple[float, ...] | None]:
    """Give `pipe` the diffusers scheduler called `name` (with its own configuration carried over).

    Returns:
        A function from a number of steps to their noise levels; it returns None where the scheduler was not changed.

    Raises:
        InputError: diffusers has no such scheduler.
    """
    if name is None or name == type(pipe.scheduler).__name__:
        return lambda steps: None
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_config"):
        raise InputError(f"diffusers has no scheduler {name!r}; give a class name, e.g. DPMSolverMultistepScheduler")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return lambda steps: scheduler_levels(pipe.scheduler, steps)


def with_noise_levels(profile: Profile, pipe: Any) -> Profile:
    """The profile with the noise levels of its steps, from the scheduler of `pipe` where it did not record them."""
    if profile.noise_levels or type(pipe.scheduler).__name__ != profile.scheduler:
        return profile
    return profile.model_copy(update={"noise_levels": scheduler_levels(pipe.scheduler, profile.num_steps)})


def scheduler_levels(scheduler: Any, steps: int) -> tuple[float, ...]:
    """Timestep over number of training timesteps, per step."""
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    return tuple(float(t) / own.config.num_train_timesteps for t in own.timesteps)


def _pipes(profile: Profile, gpus: int) -> tuple[Pattern, ...]:
    """Asynchronous pipelines of both branches, whether their errors were measured or not."""
    known = {pattern.name for pattern in profile.patterns}
    made = [p for p in generate_patterns(profile.partitions, gpus) if family_of(p.name) in PIPES]
    made = made or [_pipe(partition) for partition in profile.partitions if len(partition.stages) == gpus > 1]
    return tuple(pattern for pattern in made if pattern.name not in known and pattern.world_size <= gpus)


def unmeasured_free(profile: Profile) -> tuple[Pattern, ...]:
    """The tables without units that the profile has no errors of: they cost nothing, so they can be tried."""
    known = {pattern.name for pattern in profile.patterns}
    made = generate_patterns((), 1)
    return tuple(pattern for pattern in made if not pattern.units and pattern.name not in known)


def _pipe(partition: Partition) -> Pattern:
    stages = range(len(partition.stages))
    units = " ".join(
        f"{branch}{stage}@{stage}({','.join(f'{branch}{other}~' for other in stages if other != stage)})"
        for stage in stages for branch in "uc"
    )
    return Pattern.parse(
        f"pipe:{partition.name}", f"{units} | cfg", partition=partition.name, stages=len(partition.stages)
    )
