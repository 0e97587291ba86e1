"""Measuring contenders side by side on one model: the rows of the demo and of every later benchmark.

Latency: median denoising loop of single images, every rank with the same number of threads, one rank running the
unmodified pipeline as the baseline. Quality: PSNR against the exact full-step image of the same seed, fixed schedules
through the single-device simulator with prompts batched (the tables decide the image, not the ranks), adaptive ones
from the ranks, prompt by prompt. That ranks and simulator agree is checked on an image of every row.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ir import FixedSchedule, Plan
from ..profiler.generate import Generation
from ..profiler.timing import pinned_threads
from ..report import Row, count_patterns
from ..runtime.branch_calls import scale_signature
from ..runtime.intercept import find_denoiser
from ..runtime.parallelize import ParallelPipeline, parallelize
from ..runtime.segments import SegmentRunner
from .contenders import Contender, all_tables
from .coverage import check_covered
from .measure import QualityError, Sample, generate, max_abs_diff, simulate
from .metrics import mean_psnr, psnr

__all__ = ["Comparison", "Measured", "compare"]

Progress = Callable[[str, int, int], None]
_CEILING_DB = 100.0


@dataclass(frozen=True)
class Measured:
    """One row with what it showed."""

    row: Row
    images: Tensor
    """[prompts, 3, H, W] with values in [0, 1]; of exact rows only those that were timed."""
    steps: tuple[tuple[str, ...], ...]
    """Per prompt: the pattern of every step."""


@dataclass(frozen=True)
class Comparison:
    """All rows of one model, `single` first."""

    rows: tuple[Measured, ...]


def compare(
    generation: Generation,
    rows: Sequence[Contender],
    prompts: Sequence[str],
    *,
    threads: int = 1,
    repeats: int = 3,
    batch: int = 8,
    on_progress: Progress = lambda stage, done, total: None,
) -> Comparison:
    """Measure `single` (the unmodified pipeline) and every contender.

    Args:
        generation: how images are made, with the full number of steps.
        rows: what to measure; the first one exact.
        prompts: what images show.
        threads: CPU threads per rank while timing.
        repeats: timed generations per row.
        batch: prompts simulated together.
        on_progress: called with (stage, done, total).

    Raises:
        QualityError: ranks and simulator disagree.
        WorkerError: a rank failed.
    """
    check_covered(generation, rows[0].plan, prompts[0])
    work = _Work(generation, list(prompts), threads, repeats, batch)
    total = 2 * len(rows) + 2
    on_progress("single", 0, total)
    single = work.single()
    tables = all_tables([row.plan for row in rows])
    on_progress(f"starting {tables.world_size} ranks", 1, total)
    taken = []
    with parallelize(generation.pipe, tables, threads=threads) as workers:
        for done, row in enumerate(rows, start=2):
            on_progress(row.name, done, total)
            workers.use(row.plan)
            taken.append(work.on_ranks(row.plan, workers))
    runners: dict[int, SegmentRunner] = {}
    measured = [single]
    for done, (row, runs) in enumerate(zip(rows, taken), start=len(rows) + 2):
        on_progress(f"{row.name}: simulator, quality", done, total)
        work.check(row, runs, tables, runners)
        measured.append(work.judge(row, runs, single, tables, runners))
    return Comparison(tuple(measured))


@dataclass(frozen=True)
class _Run:
    """One generation of one prompt on the ranks."""

    sample: Sample
    steps: tuple[str, ...]


class _Work:
    """What the rows of one comparison share."""

    def __init__(self, generation: Generation, prompts: list[str], threads: int, repeats: int, batch: int) -> None:
        self._generation, self._prompts = generation, prompts
        self._threads, self._repeats, self._batch = threads, repeats, batch

    def single(self) -> Measured:
        """The unmodified pipeline on one rank; its images, prompts batched, are the reference."""
        with pinned_threads(self._threads):
            samples = [self._alone(self._generation, index) for index in range(self._repeats)]
        self._exact = [sample.images for sample in samples]
        self._latency_s = statistics.median(sample.loop_s for sample in samples)
        steps = self._generation.num_inference_steps
        chunks = range(0, len(self._prompts), self._batch)
        images = torch.cat([
            generate(self._generation, self._prompts[k : k + self._batch], first=k).images for k in chunks
        ])
        row = Row(
            name="single", ranks=1, steps=steps, patterns={"single": steps}, latency_s=self._latency_s, speedup=1.0,
            ideal_speedup=1.0, work_speedup=1.0, predicted_speedup=1.0, max_abs_diff=0.0,
        )
        return Measured(row, images, (("single",) * steps,) * len(self._prompts))

    def on_ranks(self, plan: Plan, workers: ParallelPipeline) -> list[_Run]:
        """Timed generations; an adaptive plan runs every prompt, as each finds its own window."""
        count = max(self._repeats, len(self._prompts)) if _is_adaptive(plan) else self._repeats
        generation = self._generation_of(plan)
        return [_Run(self._alone(generation, index), workers.executed) for index in range(count)]

    def check(self, row: Contender, runs: Sequence[_Run], tables: Plan, runners: dict[int, SegmentRunner]) -> None:
        """Refuse images that differ between ranks and simulator (of `branch`, that is the split-batch reference).

        Raises:
            QualityError: they differ.
        """
        with pinned_threads(self._threads):
            images, _ = self._simulated(row.plan, self._prompts[:1], 1, tables, runners)
        difference = max_abs_diff(runs[0].sample.images, images)
        if difference and row.plan.ranks[0].device == "cpu":
            raise QualityError(
                f"{row.name}: the image of {row.plan.world_size} ranks differs from the simulator's by "
                f"{difference:.1e}, expected 0; report this with the plan"
            )

    def judge(
        self, row: Contender, runs: Sequence[_Run], single: Measured, tables: Plan, runners: dict[int, SegmentRunner]
    ) -> Measured:
        """The row of a contender."""
        plan = row.plan
        latency_s = statistics.median(run.sample.loop_s for run in runs)
        full = plan.num_steps == self._generation.num_inference_steps
        quality: dict[str, float] = {}
        if plan.is_exact and full:
            images, executed = self._taken(runs)
            quality["max_abs_diff"] = max_abs_diff(images, torch.cat(self._exact[: len(images)]))
        else:
            images, executed = (
                self._taken(runs) if _is_adaptive(plan)
                else self._simulated(plan, self._prompts, self._batch, tables, runners)
            )
            decibels = psnr(images, single.images)
            quality = {
                "psnr_db": mean_psnr(images, single.images),
                "psnr_db_min": min(*decibels, _CEILING_DB), "max_abs_diff": max_abs_diff(images, single.images),
            }
        return Measured(
            Row(
                name=row.name, ranks=plan.world_size, steps=plan.num_steps, patterns=count_patterns(executed[0]),
                latency_s=latency_s, speedup=self._latency_s / latency_s, ideal_speedup=plan.predictions.ideal_speedup,
                work_speedup=plan.predictions.work_speedup,
                predicted_speedup=plan.predictions.speedup, predicted_psnr_db=plan.predictions.psnr_db, **quality,
            ),
            images, tuple(executed),
        )

    def _taken(self, runs: Sequence[_Run]) -> tuple[Tensor, list[tuple[str, ...]]]:
        """Images and steps of the ranks, each prompt once."""
        once = runs[: len(self._prompts)]
        return torch.cat([run.sample.images for run in once]), [run.steps for run in once]

    def _alone(self, generation: Generation, index: int) -> Sample:
        k = index % len(self._prompts)
        return generate(generation, self._prompts[k : k + 1], first=k)

    def _generation_of(self, plan: Plan) -> Generation:
        return replace(self._generation, num_inference_steps=plan.num_steps)

    def _simulated(
        self, plan: Plan, prompts: Sequence[str], batch: int, tables: Plan, runners: dict[int, SegmentRunner]
    ) -> tuple[Tensor, list[tuple[str, ...]]]:
        _, denoiser = find_denoiser(self._generation.pipe)
        for images in {min(batch, len(prompts)), len(prompts) % batch or batch}:
            if images not in runners:
                signature = scale_signature(tables.model.signature, 1, images)
                runners[images] = SegmentRunner(denoiser, signature, tables.patterns, tables.partitions, batch=images)
        return simulate(self._generation_of(plan), plan, prompts, batch=batch, runners=runners)


def _is_adaptive(plan: Plan) -> bool:
    return not isinstance(plan.schedule, FixedSchedule)
