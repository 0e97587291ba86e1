"""The error side of a profile: discrepancy curves, errors by step and age, and whole schedules to check them on.

Every finished part (a batch of prompts, a schedule) goes into the session's `Partial`, so that a stopped session does
it only once. Cost: prompts x steps for the exact runs, prompts x probes x steps for the propagation, curve prompts x
measured steps x ages x distinct segments for the errors, one block of prompts per schedule: O(steps x patterns), as
no run is finished for a single (step, pattern, age).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ir import (
    BRANCHES,
    Branch,
    CallSignature,
    ErrorSampling,
    FixedSchedule,
    Guidance,
    ModelInfo,
    Partition,
    Pattern,
    PatternErrors,
    Redundancy,
)
from ..runtime.branch_calls import scale_signature
from ..runtime.intercept import find_denoiser
from ..runtime.segments import SegmentRunner
from .attribution import grouped_errors
from .batches import Batch, block_borders, blocks_of
from .compounding import MeasuredSchedule
from .curves import error_curves
from .decode import decoder_of
from .error_helpers import ErrorHelpers
from .generate import Generation, require_finite
from .grid import THINNED, Grid
from .linear import sampler_map
from .partial import Partial
from .record import Option, Recorder, guided, options_of
from .resume import known_steps
from .sensitivity import propagate, pull_back_images, standard_error_db
from .trials import KEPT_BYTES, Trial, Trials, work_of

__all__ = ["Curves", "ErrorMeasurement", "ErrorSettings"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ErrorSettings:
    """How finely errors are measured."""

    probes: int = 4
    """Random image directions per prompt."""
    curve_prompts: int = 8
    """Prompts, the first ones, on which errors by step and age are measured."""
    grid: Grid = THINNED
    """Steps and ages that are measured; the rest is interpolated."""
    images_per_batch: int = 8
    """Prompts generated together."""


@dataclass(frozen=True)
class Curves:
    """What exact generations showed."""

    num_steps: int
    guidance: Guidance
    redundancy: Redundancy
    errors: tuple[PatternErrors, ...]
    sampling: ErrorSampling


class ErrorMeasurement:
    """Measures one pipeline's prompts over a given set of tables."""

    def __init__(
        self,
        generation: Generation,
        prompts: Sequence[str],
        denoiser: nn.Module | None,
        signature: CallSignature,
        partitions: Sequence[Partition],
        patterns: Sequence[Pattern],
        settings: ErrorSettings,
        partial: Partial,
        on_progress: Progress = lambda stage, done, total: None,
        helpers: ErrorHelpers | None = None,
    ) -> None:
        """
        Args:
            generation, prompts: what is generated.
            denoiser: of the pipeline, unless it is to be found.
            signature: one branch's call.
            partitions, patterns: the tables.
            settings: how finely.
            partial: keeps what is finished.
            on_progress: called with (stage, done, total).
            helpers: processes that share the work.
        """
        self._helpers = helpers or ErrorHelpers(0, 1, None)
        denoiser = find_denoiser(generation.pipe)[1] if denoiser is None else denoiser
        self._generation, self._denoiser, self._signature = generation, denoiser, signature
        self._device = next(denoiser.parameters()).device
        self._partitions, self._patterns = tuple(partitions), tuple(patterns)
        self._settings, self._partial, self._progress = settings, partial, on_progress
        self._exact = next(p for p in patterns if p.is_exact and p.world_size == 2)
        self._options = options_of(self._patterns, settings.grid.ages)
        self._runners: dict[int, SegmentRunner] = {}
        size = settings.images_per_batch
        curved = list(prompts)[: settings.curve_prompts]
        half = min(size, -(-len(curved) // 2))  # two batches, for two processes
        self._batches = [Batch(k, curved[k : k + half]) for k in range(0, len(curved), half)]
        # No gradients are kept of the others, so they are generated in the batches in which schedules are.
        self._borders = block_borders(len(prompts))
        for begin, end in pairwise(sorted({len(curved), *(b for b in self._borders if b > len(curved))})):
            self._batches += [
                Batch(k, list(prompts)[k : min(k + 2 * size, end)]) for k in range(begin, end, 2 * size)
            ]
        self._curved, self._prompts = len(curved), len(prompts)
        self._trials = Trials(
            generation, denoiser, self._partitions, self._patterns, self._exact, self._runner, len(prompts)
        )

    def curves(self, known: Callable[[Curves], None] = lambda curves: None) -> Curves:
        """Run every prompt exactly; errors by step and age on the first ones.

        Args:
            known: called once with what the first prompts have shown, while other processes go on with the others.
        """
        missing = []
        for number, batch in enumerate(self._batches):
            kept = self._partial.get(batch.name)
            if kept is not None:
                batch.restore(*kept, self._options, self._device)
            else:
                missing.append(number)

        def done(number: int, kept: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
            batch = self._batches[number]
            self._partial.put(batch.name, *kept)
            batch.restore(kept[1], kept[0], self._options, self._device)
            left = sum(not batch.rel_mae for batch in self._batches)
            self._progress("exact runs, errors by step and age", len(self._batches) - left, len(self._batches))
            tell()

        told: list[Curves] = []

        def tell() -> None:
            if not told and all(batch.rel_mae for batch in self._curved_batches):
                told.append(self._curves(self._curved_batches))
                known(told[0])

        tell()
        self._helpers.share("prompts", missing, self.prompts, done)
        return self._curves(self._batches)

    def _curves(self, batches: Sequence[Batch]) -> Curves:
        """What `batches`, those with errors by step and age among them, have shown."""
        steps = len(batches[0].rel_mae[0])
        sketches = [batch.sketches for batch in batches if batch.sketches is not None]
        rel_mae = [row for batch in batches for row in batch.rel_mae]
        measured = [step for step in range(steps) if sketches[0].steps[step]]
        spread = [
            standard_error_db([each.steps[step][option] for each in sketches])
            for step in measured for option in sketches[0].steps[step]
        ]
        return Curves(
            num_steps=steps,
            guidance=Guidance(rel_mae=tuple(tuple(float(f"{v:.6g}") for v in row) for row in rel_mae)),
            redundancy=self._redundancy(),
            errors=error_curves(sketches, self._options, self._settings.grid.ages, steps),
            sampling=ErrorSampling(
                prompts=self._curved, probes=self._settings.probes, measured_steps=max(1, len(measured)),
                ages=self._settings.grid.ages, estimator_db=round(float(np.mean(spread)), 3) if spread else 0.0,
            ),
        )

    def guidance_at(self, scale: float) -> Guidance:
        """The discrepancy curves at another guidance scale, from exact generations of the first prompts."""
        name = f"guidance {scale:g}"
        kept = self._partial.get(name)
        if kept is not None:
            return Guidance.model_validate(kept[1])
        batches = range(len(self._curved_batches))
        rows: dict[int, list[list[float]]] = {}

        def done(number: int, found: list[list[float]]) -> None:
            rows[number] = found
            self._progress(name.replace("guidance", "guidance scale"), len(rows), len(batches))

        self._helpers.share("discrepancies", batches, lambda number: self.discrepancies(number, scale), done, scale)
        rel_mae = tuple(tuple(float(f"{v:.6g}") for v in row) for number in batches for row in rows[number])
        guidance = Guidance(rel_mae=rel_mae, scale=scale)
        self._partial.put(name, guidance.model_dump(mode="json"))
        return guidance

    def discrepancies(self, number: int, scale: float) -> list[list[float]]:
        """The discrepancy per prompt and step of batch `number` at guidance scale `scale`."""
        batch = self._batches[number]
        recorder = self._recorder(batch, (), scale)
        self._generation.at(scale).latents(batch.prompts, recorder, batch.first)
        return [list(row) for row in zip(*recorder.recording.rel_mae)]

    @torch.no_grad()
    def schedules(
        self, model: ModelInfo, errors: Sequence[PatternErrors], proposals: Sequence[tuple[tuple[str, ...], str]]
    ) -> list[MeasuredSchedule]:
        """Measure whole schedules, each on one block of the prompts in turn.

        Args:
            model: for the plans that are simulated.
            errors: the curves, for the schedules' errors by kind.
            proposals: (steps, kind), like ones next to each other.
        """
        blocks = blocks_of(self._batches, self._borders, 2 * self._settings.images_per_batch)
        by_name, values = {pattern.name: pattern for pattern in self._patterns}, dict[int, list[float]]()
        known = {each.pattern: each for each in errors}
        names = [f"schedule {n % len(blocks)} {FixedSchedule(steps=steps)}" for n, (steps, _) in enumerate(proposals)]
        for number, name in enumerate(names):
            kept = self._partial.get(name)
            if kept is not None:
                values[number] = kept[1]

        def done(task: Trial, psnrs: list[float]) -> None:
            self._partial.put(names[task.number], psnrs)
            values[task.number] = psnrs
            self._progress("whole schedules", len(values), len(proposals))

        tasks = []
        for number, (steps, _) in enumerate(proposals):
            if number not in values:
                known_first = known_steps(by_name, steps)
                block = [replace(each, pairs=each.pairs[:known_first].clone()) for each in blocks[number % len(blocks)]]
                tasks.append(Trial(number, steps, block))
        tasks.sort(key=lambda task: -work_of(by_name, task))
        self._helpers.share("schedule", tasks, lambda task: self.schedule(task, model), done, model)
        return [
            MeasuredSchedule(grouped_errors(by_name, known, steps), tuple(values[n]), n % len(blocks), kind)
            for n, (steps, kind) in enumerate(proposals)
        ]

    def prompts(self, number: int, context: None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Run batch `number` of the prompts: what `Partial` keeps of it."""
        batch = self._batches[number]
        self._record(batch, number)
        return batch.kept(self._options)

    def schedule(self, trial: Trial, model: ModelInfo) -> list[float]:
        """PSNR per prompt of one schedule."""
        return self._trials.psnr(trial, model)

    def _runner(self, images: int) -> SegmentRunner:
        if images not in self._runners:
            self._runners[images] = SegmentRunner(
                self._denoiser, scale_signature(self._signature, 1, images), self._patterns, self._partitions,
                batch=images,
            )
        return self._runners[images]

    def _recorder(self, batch: Batch, options: Sequence[Option], scale: float, number: int = 0) -> Recorder:
        def on_step(step: int, total: int) -> None:
            if options:
                self._progress("recording", number * total + step + 1, len(self._curved_batches) * total)

        # What is measured at all ages takes fewer, larger evaluations, of which no gradients are kept.
        wide = len(self._settings.grid.ages) * len(batch.prompts)
        return Recorder(
            lambda: self._generation.pipe.scheduler, self._runner(len(batch.prompts)),
            [self._exact, *self._patterns], options, scale, self._settings.grid, on_step=on_step,
            wide=self._runner(wide) if options and wide <= 2 * self._settings.images_per_batch else None,
        )

    @property
    def _curved_batches(self) -> list[Batch]:
        return [batch for batch in self._batches if batch.first < self._curved]

    def _record(self, batch: Batch, number: int) -> None:
        scale, curved = self._generation.guidance_scale, batch.first < self._curved
        recorder = self._recorder(batch, self._options if curved else (), scale, number)
        batch.final = require_finite(
            self._generation.latents(batch.prompts, recorder, batch.first), f"the latents of {batch.prompts}"
        )
        record = recorder.recording
        batch.pairs = self._first_pairs(record.pairs)
        batch.rel_mae = [list(row) for row in zip(*record.rel_mae)]
        if not curved:
            return
        batch.changes = record.changes
        steps = len(record.pairs)
        sampler = sampler_map(record.scheduler, steps)
        path = next(leaf.path for leaf in self._signature.leaves if leaf.shape is not None)
        start = record.inputs[0]["cond"][path] / float(sampler.start_to_input[0])
        sampler.check(start, [guided(pair, scale) for pair in record.pairs], batch.final)
        probes, pixels = pull_back_images(
            decoder_of(self._generation.pipe, self._generation.options), batch.final, self._settings.probes,
            self._generation.seed + batch.first,
        )
        total = len(self._curved_batches)
        batch.sketches = propagate(
            record, self._runner(len(batch.prompts)), self._exact, sampler, path, probes, pixels, scale,
            on_step=lambda done, all_steps: self._progress(
                "propagation to the image", number * all_steps + done, total * all_steps
            ),
        )

    def _first_pairs(self, pairs: Sequence[Mapping[Branch, Tensor]]) -> Tensor:
        """Estimates of as many first steps as schedules may begin with, if those of all prompts take little memory."""
        half = pairs[: len(pairs) // 2]
        each = sum(pair[branch][0].nbytes for pair in half for branch in BRANCHES)
        if each * self._prompts > KEPT_BYTES:
            half = half[:0]
        shape = (0, 2, *pairs[0]["cond"].shape)
        return torch.stack([torch.stack([pair[b] for b in BRANCHES]) for pair in half]) if half else torch.empty(shape)

    def _redundancy(self) -> Redundancy:
        recorded = [batch for batch in self._batches if batch.changes]
        counts = np.array([len(batch.prompts) for batch in recorded], dtype=float)
        change: dict[str, tuple[float, ...]] = {}
        for name in recorded[0].changes[0] if recorded else ():
            rows = np.array([[step[name] for step in batch.changes] for batch in recorded])
            change[name] = tuple(float(f"{value:.4g}") for value in counts @ rows / counts.sum())
        return Redundancy(change=change)
