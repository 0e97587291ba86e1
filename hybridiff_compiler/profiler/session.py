"""The profiling session: capture, costs, recorded generations, error curves, and the fit on whole schedules."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir import (
    Compounding,
    Costs,
    FixedSchedule,
    Guidance,
    LayerGraph,
    ModelInfo,
    Plan,
    PlanMismatchError,
    Profile,
    Provenance,
    RankSpec,
    UsageError,
)
from ..ir.versions import installed_versions
from ..quality import MAX_PSNR_DB, psnr
from ..runtime.intercept import find_denoiser
from ..runtime.segments import SegmentRunner, scale_signature
from ..runtime.simulator import Simulator
from .compounding import fit_compounding
from .curves import error_curves
from .decode import decoder_of
from .generate import FirstCall, Generation, noise_levels, prompts_digest
from .linear import sampler_map
from .record import Recorder, guided, options_of
from .sensitivity import Sketches, propagate, pull_back_images
from .settling import Tables, measure_costs
from .timing import pinned_threads

__all__ = ["ProfileSession", "Progress"]

Progress = Callable[[str, int, int], None]
"""Called with (stage of the session, done, total)."""

Proposals = Callable[[Profile], Sequence[tuple[tuple[str, ...], float]]]


class ProfileSession:
    """Measures one pipeline; the planner's part (which tables, which schedules) comes in as functions."""

    def __init__(
        self,
        generation: Generation,
        prompts: Sequence[str],
        *,
        name: str,
        threads: int | None,
        probes: int = 4,
        ages: Sequence[int] = (1, 2, 3, 5, 8),
        images_per_batch: int = 8,
        rounds: int = 15,
        backend: str = "eager",
        random_weights: bool = False,
        on_progress: Progress | None = None,
    ) -> None:
        if not prompts:
            raise UsageError("got no prompts; give at least one (a dozen or more for a profile to trust)")
        self._generation, self._prompts, self._name = generation, list(prompts), name
        self._threads, self._probes, self._ages = threads, probes, tuple(ages)
        self._chunk, self._rounds, self._backend = images_per_batch, rounds, backend
        self._random_weights = random_weights
        self._progress: Progress = on_progress or (lambda stage, done, total: None)
        _, self._denoiser = find_denoiser(generation.pipe)
        self._runners: dict[int, SegmentRunner] = {}
        self._final: list[Tensor] = []

    def measure(self, tables: Tables, proposals: Proposals, known: Profile | None = None) -> Profile:
        """Run the whole session.

        Args:
            tables: from the layer graph and layer times, the partitions and patterns to judge (an exact pattern that
                computes the branches one by one among them).
            proposals: from the profile so far, schedules and their summed errors on which the compounding is fitted.
            known: a profile of the same generations made elsewhere. Its partitions, patterns and errors are kept
                (what a table does to an image does not depend on the device) and only costs are measured.

        Raises:
            PlanMismatchError: `known` is for another denoiser, step count, scheduler or guidance scale.
        """
        trainable = [parameter for parameter in self._denoiser.parameters() if parameter.requires_grad]
        for parameter in trainable:  # gradients are wanted of the latents alone
            parameter.requires_grad_(False)
        try:
            return self._measure(tables, proposals, known)
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def _measure(self, tables: Tables, proposals: Proposals, known: Profile | None) -> Profile:
        first = FirstCall()
        self._generation.latents(self._prompts[:1], first)
        signature, call = first.require()
        levels = noise_levels(self._generation.pipe.scheduler, first.num_steps)
        self._progress("capture", 0, 1)
        bare = SegmentRunner(self._denoiser, signature, (), ())
        self._progress("capture", 1, 1)
        with pinned_threads(self._threads):
            if known is not None:
                self._check_same(known, bare.layers)
            measured = measure_costs(
                self._denoiser, bare, call.inputs,
                tables if known is None else lambda graph, costs: (known.partitions, known.patterns),
                backend=self._backend, rounds=self._rounds, step_overhead_s=first.step_overhead(),
                on_progress=self._progress,
            )
        costs, self._partitions, self._patterns = measured.costs, measured.partitions, measured.patterns
        self._exact = next(p for p in self._patterns if p.is_exact and p.world_size == 2)
        self._signature = signature
        if known is not None:
            return known.model_copy(update={
                "model": self._model(bare.layers), "costs": costs, "provenance": self._provenance(),
                "noise_levels": levels, "errors_provenance": known.errors_provenance or known.provenance,
            })
        profile = self._with_errors(costs, bare.layers)
        return profile.model_copy(update={
            "noise_levels": levels, "compounding": self._fit(profile, proposals(profile)),
        })

    def _check_same(self, known: Profile, graph: LayerGraph) -> None:
        pipe, generation = self._generation.pipe, self._generation
        got = {
            "layer graph": graph.fingerprint()[:12], "steps": generation.num_inference_steps,
            "scheduler": type(pipe.scheduler).__name__, "guidance scale": generation.guidance_scale,
        }
        theirs = {
            "layer graph": known.model.fingerprint[:12], "steps": known.num_steps, "scheduler": known.scheduler,
            "guidance scale": known.guidance_scale,
        }
        for what, value in got.items():
            if theirs[what] != value:
                raise PlanMismatchError(
                    f"errors cannot be taken over from this profile: its {what} is {theirs[what]}, this pipeline's "
                    f"is {value}; measure the errors here"
                )

    def _runner(self, signature: Any, images: int) -> SegmentRunner:
        if images not in self._runners:
            self._runners[images] = SegmentRunner(
                self._denoiser, scale_signature(signature, 1, images), self._patterns, self._partitions, batch=images,
            )
        return self._runners[images]

    def _chunks(self) -> list[tuple[int, list[str]]]:
        return [(k, self._prompts[k : k + self._chunk]) for k in range(0, len(self._prompts), self._chunk)]

    def _with_errors(self, costs: Costs, graph: LayerGraph) -> Profile:
        options = options_of(self._patterns, self._ages)
        decode = decoder_of(self._generation.pipe)
        scale = self._generation.guidance_scale
        batches: list[Sketches] = []
        rel_mae: list[list[float]] = []
        steps = 0
        chunks = self._chunks()
        for index, (first, prompts) in enumerate(chunks):
            def progress(stage: str, done: int, total: int, index: int = index) -> None:
                self._progress(stage, index * total + done, len(chunks) * total)

            runner = self._runner(self._signature, len(prompts))
            recorder = Recorder(
                lambda: self._generation.pipe.scheduler, runner, [self._exact, *self._patterns], options, scale,
                on_step=lambda step, total: progress("errors by step and age", step + 1, total),
            )
            final = self._generation.latents(prompts, recorder, first)
            self._final.append(final)
            record = recorder.recording
            steps = len(record.pairs)
            sampler = sampler_map(record.scheduler, steps)
            path = next(leaf.path for leaf in self._signature.leaves if leaf.shape is not None)
            start = record.inputs[0]["cond"][path] / float(sampler.start_to_input[0])
            sampler.check(start, [guided(pair, scale) for pair in record.pairs], final)
            probes, pixels = pull_back_images(decode, final, self._probes, self._generation.seed + first)
            batches.append(propagate(
                record, runner, self._exact, sampler, path, probes, pixels, scale,
                on_step=lambda done, total: progress("propagation to the image", done, total),
            ))
            rel_mae += [list(row) for row in zip(*record.rel_mae)]
        return Profile(
            model=self._model(graph), graph=graph, costs=costs, num_steps=steps,
            scheduler=type(self._generation.pipe.scheduler).__name__, guidance_scale=scale,
            guidance=Guidance(rel_mae=tuple(tuple(float(f"{v:.6g}") for v in row) for row in rel_mae)),
            partitions=self._partitions, patterns=self._patterns,
            errors=error_curves(batches, options, self._ages, steps), provenance=self._provenance(),
        )

    @torch.no_grad()
    def _fit(self, profile: Profile, proposals: Sequence[tuple[tuple[str, ...], float]]) -> Compounding:
        """Measure whole schedules on the profiling prompts and fit PSNR against the summed errors."""
        decode = decoder_of(self._generation.pipe)
        reference = torch.cat([decode(final) for final in self._final])
        raw, measured = [], []
        for done, (steps, error) in enumerate(proposals):
            self._progress("whole schedules", done, len(proposals))
            plan = Plan(
                model=profile.model, ranks=(RankSpec(device="cpu"),) * self._exact.world_size,
                partitions=profile.partitions, patterns=profile.patterns, exact=self._exact.name,
                schedule=FixedSchedule(steps=steps),
            )
            simulator = Simulator(plan, self._denoiser, runners=self._runners)
            images = torch.cat([
                decode(self._generation.latents(prompts, simulator, first)) for first, prompts in self._chunks()
            ])
            raw.append(-20 * math.log10(error))
            measured.append([min(value, MAX_PSNR_DB) for value in psnr(images, reference)])
        self._progress("whole schedules", len(proposals), len(proposals))
        return fit_compounding(raw, measured)

    def _model(self, graph: LayerGraph) -> ModelInfo:
        parameters = list(self._denoiser.parameters())
        return ModelInfo(
            name=self._name, denoiser=type(self._denoiser).__name__, fingerprint=graph.fingerprint(),
            parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
            dtype=str(parameters[0].dtype).removeprefix("torch."), signature=self._signature,
        )

    def _provenance(self) -> Provenance:
        device = next(self._denoiser.parameters()).device
        return Provenance(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            device=device_name(device), device_type="cuda" if device.type == "cuda" else "cpu", backend=self._backend,
            threads=self._threads if device.type == "cpu" else None,
            versions=installed_versions("torch", "diffusers", "hybridiff-compiler"),
            seed=self._generation.seed, prompts=len(self._prompts), prompts_sha256=prompts_digest(self._prompts),
            random_weights=self._random_weights,
        )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
