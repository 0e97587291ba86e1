"""The profiling session: capture, costs, recorded generations, error curves, and the fit on whole schedules."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ..backends.hoisted_sizes import with_hoisted
from ..ir import (
    WHOLE,
    Costs,
    Guidance,
    LayerGraph,
    ModelInfo,
    Partition,
    Pattern,
    PlanMismatchError,
    Profile,
    Provenance,
    Redundancy,
    UsageError,
)
from ..ir.versions import installed_versions
from ..runtime.intercept import find_denoiser
from ..runtime.segments import SegmentRunner
from .attribution import weighted
from .compounding import fit_schedules
from .drift import Drift
from .error_helpers import ErrorHelpers
from .errors import Curves, ErrorMeasurement, ErrorSettings
from .generate import FirstCall, Generation, noise_levels, prompts_digest, require_finite
from .jobs import GraphBuilder, Job
from .partial import Partial, weights_digest
from .redundancy import SURVEYED_PROMPTS, survey_redundancy
from .settling import measure_costs
from .timers import timers_for
from .timing import pinned_threads

__all__ = ["ProfileSession", "Progress"]

Progress = Callable[[str, int, int], None]
"""Called with (stage of the session, done, total)."""

_DRIFT = "times of the whole"
"""Name of what `Drift` keeps in the `Partial`."""

Tables = Callable[
    [LayerGraph, Sequence[float], Redundancy | None], tuple[tuple[Partition, ...], tuple[Pattern, ...]]
]
"""From the layer graph, layer times, and how much every value changes from step to step, the partitions and patterns
worth measuring."""
Proposals = Callable[[Profile], Sequence[tuple[tuple[str, ...], str]]]
"""From the profile so far, schedules to measure whole, each with its kind (`solved` or `random`)."""


class ProfileSession:
    """Measures one pipeline; the planner's part (which tables, which schedules) comes in as functions."""

    def __init__(
        self,
        generation: Generation,
        prompts: Sequence[str],
        *,
        name: str,
        threads: int | None,
        errors: ErrorSettings | None = None,
        guidance_scales: Sequence[float] = (),
        rounds: int = 15,
        backend: str = "eager",
        random_weights: bool = False,
        partial: Path | None = None,
        tables_for: str = "",
        helpers: int = 0,
        on_progress: Progress | None = None,
    ) -> None:
        """
        Args:
            generation: how images are made.
            prompts: calibration prompts.
            name: for display.
            threads: CPU threads while costs are timed (None: as torch is set).
            errors: how finely errors are measured.
            guidance_scales: further guidance scales at which the discrepancy is recorded.
            rounds: timings per layer and stage.
            backend: see `hybridiff_compiler.backends`; of the costs.
            random_weights: mark the profile as good for latency only.
            partial: file that keeps the state of an unfinished session; one that exists is continued.
            tables_for: tells apart sessions over different tables, for `partial`.
            helpers: processes that share the work on the errors with this one, each with a copy of the pipeline.
            on_progress: called with (stage, done, total).
        """
        if not prompts:
            raise UsageError("got no prompts; give at least one (a dozen or more for a profile to trust)")
        self._generation, self._prompts, self._name = generation, list(prompts), name
        self._threads, self._errors = threads, errors or ErrorSettings()
        self._scales = [scale for scale in dict.fromkeys(guidance_scales) if scale != generation.guidance_scale]
        self._rounds, self._backend, self._partial_path = rounds, backend, partial
        self._random_weights, self._tables_for = random_weights, tables_for
        self._helpers = helpers
        self._on_progress: Progress = on_progress or (lambda stage, done, total: None)
        self._drift: Drift | None = None
        _, self._denoiser = find_denoiser(generation.pipe)

    def measure(
        self, tables: Tables, proposals: Proposals, known: Profile | None = None, *,
        survey: bool = True,
    ) -> Profile:
        """Run the whole session.

        Args:
            tables: see `Tables` (an exact pattern that computes the branches one by one is among the patterns).
            proposals: from the profile so far, schedules and their summed errors on which the compounding is fitted.
            known: a profile of the same generations made elsewhere. Its partitions, patterns and errors are kept
                (what a table does to an image does not depend on the device) and only costs are measured.
            survey: measure how much every value changes from step to step before partitions are chosen (not with
                `known`); otherwise `tables` gets None for it.

        Raises:
            PlanMismatchError: `known` is for another denoiser, step count, scheduler or guidance scale.
        """
        trainable = [parameter for parameter in self._denoiser.parameters() if parameter.requires_grad]
        for parameter in trainable:  # gradients are wanted of the latents alone
            parameter.requires_grad_(False)
        try:
            return self._measure(tables, proposals, known, survey and known is None)
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def _measure(
        self, tables: Tables, proposals: Proposals, known: Profile | None, survey: bool
    ) -> Profile:
        first = FirstCall()
        require_finite(self._generation.latents(self._prompts[:1], first), f"the latents of {self._prompts[:1]}")
        self._signature, call = first.require()
        levels = noise_levels(self._generation.pipe.scheduler, first.num_steps)
        self._progress("capture", 0, 1)
        bare = SegmentRunner(self._denoiser, self._signature, (), ())
        self._progress("capture", 1, 1)
        graph = bare.layers
        if known is not None:
            self._check_same(known, graph)
        partial = Partial(None if known is not None else self._partial_path, self._settings(graph))
        self._drift = self._watch_drift(bare, call.inputs, known.patterns if known is not None else tables(
            graph, [layer.flops + 1.0 for layer in graph.layers], None
        )[1], partial)
        if partial.found:
            self._progress(f"continuing {self._partial_path} ({partial.found} parts are done)", 1, 1)
        redundancy = None if not survey else survey_redundancy(
            bare.captured(1), self._generation, self._prompts[:SURVEYED_PROMPTS], partial,
            on_step=lambda done, total: self._progress("changes from step to step", done, total),
        )
        kept = partial.get("costs")
        if kept is not None:
            costs = Costs.model_validate(kept[1]["costs"])
            self._partitions = tuple(Partition.model_validate(each) for each in kept[1]["partitions"])
            self._patterns = tuple(Pattern.model_validate(each) for each in kept[1]["patterns"])
        else:
            costs = first.added_to(self._measure_costs(bare, call.inputs, tables, known, redundancy))
            partial.put("costs", {
                "costs": costs.model_dump(mode="json"),
                "partitions": [each.model_dump(mode="json") for each in self._partitions],
                "patterns": [each.model_dump(mode="json") for each in self._patterns],
            })
        if known is not None:
            return known.model_copy(update={
                "model": self._model(graph), "graph": with_hoisted(bare.captured(1)),
                "costs": self._with_drift(costs), "provenance": self._provenance(),
                "noise_levels": levels, "errors_provenance": known.errors_provenance or known.provenance,
            })
        profile = self._with_errors(costs, graph, levels, proposals, partial)
        partial.remove()
        if redundancy is not None and profile.redundancy is not None:
            redundancy = Redundancy(change=redundancy.change | profile.redundancy.change)
        return profile.model_copy(update={
            "graph": with_hoisted(bare.captured(1)), "costs": self._with_drift(profile.costs),
            "redundancy": redundancy or profile.redundancy,
        })

    def _measure_costs(
        self, bare: SegmentRunner, inputs: Any, tables: Tables, known: Profile | None, redundancy: Redundancy | None
    ) -> Costs:
        device = next(self._denoiser.parameters()).device
        inputs = {branch: {path: leaf.to(device) for path, leaf in side.items()} for branch, side in inputs.items()}
        with pinned_threads(self._threads), timers_for(
            self._denoiser, self._signature, inputs, captured={1: bare.captured(1)}
        ) as timers:
            measured = measure_costs(
                bare, inputs,
                lambda graph, costs: tables(graph, costs, redundancy) if known is None
                else (known.partitions, known.patterns),
                timers, backend=self._backend, rounds=self._rounds, on_progress=self._progress,
            )
        self._partitions, self._patterns = measured.partitions, measured.patterns
        return measured.costs

    def _progress(self, stage: str, done: int, total: int) -> None:
        if self._drift is not None:
            self._drift.look()
        self._on_progress(stage, done, total)

    def _watch_drift(
        self, bare: SegmentRunner, inputs: Any, patterns: Sequence[Pattern], partial: Partial
    ) -> Drift | None:
        """Where samples cost little, and other processes at work do not make them longer."""
        if next(self._denoiser.parameters()).device.type != "cpu" or self._backend != "eager" or self._threads != 1:
            return None
        exact = next(pattern for pattern in patterns if pattern.is_exact and pattern.partition == WHOLE)
        builder = GraphBuilder(self._denoiser, self._signature, inputs, {1: bare.captured(1)})
        with pinned_threads(self._threads):
            sampler = builder.sampler(Job(kind="segment", backend=self._backend, patterns=(exact,)))
        return Drift(sampler, partial.noted(_DRIFT))

    def _with_drift(self, costs: Costs) -> Costs:
        """`costs` whose spreads cover how far the whole's time has moved during the session."""
        return costs if self._drift is None else costs.with_drift(self._drift.spread)

    def _with_errors(
        self, costs: Costs, graph: LayerGraph, levels: tuple[float, ...], proposals: Proposals,
        partial: Partial,
    ) -> Profile:
        threads = max(1, torch.get_num_threads() // (1 + self._helpers))
        arguments: dict[str, Any] = {
            "generation": self._generation, "prompts": self._prompts, "denoiser": None, "signature": self._signature,
            "partitions": self._partitions, "patterns": self._patterns, "settings": self._errors,
        }
        with pinned_threads(threads), closing(ErrorHelpers(
            self._helpers, threads, arguments, on_note=lambda text: self._progress(text, 1, 1),
        )) as helpers:
            measurement = ErrorMeasurement(**arguments, partial=partial, on_progress=self._progress, helpers=helpers)
            return self._judged(measurement, costs, graph, levels, proposals)

    def _judged(
        self, measurement: ErrorMeasurement, costs: Costs, graph: LayerGraph, levels: tuple[float, ...],
        proposals: Proposals,
    ) -> Profile:
        def profiled(curves: Curves, further: tuple[Guidance, ...] = ()) -> Profile:
            return Profile(
                model=self._model(graph), graph=graph, costs=costs, num_steps=curves.num_steps,
                scheduler=type(self._generation.pipe.scheduler).__name__,
                guidance_scale=self._generation.guidance_scale, noise_levels=levels, guidance=curves.guidance,
                further_guidance=further, redundancy=curves.redundancy, partitions=self._partitions,
                patterns=self._patterns, errors=curves.errors, sampling=curves.sampling,
                provenance=self._provenance(),
            )

        by_name = {pattern.name: pattern for pattern in self._patterns}
        trials: list[tuple[tuple[str, ...], str]] = []
        curves = measurement.curves(lambda first: trials.extend(proposals(profiled(first))))
        profile = profiled(curves, tuple(measurement.guidance_at(scale) for scale in self._scales))
        fit = fit_schedules(measurement.schedules(profile.model, profile.errors, trials))
        return profile.model_copy(update={
            "errors": weighted(profile.errors, by_name, fit.weights), "compounding": fit.compounding,
            "sampling": curves.sampling.model_copy(update={"weights": fit.weights}),
        })

    def _settings(self, graph: LayerGraph) -> dict[str, str]:
        """Everything that decides what this session measures."""
        generation, source = self._generation, self._provenance()
        return {
            "model": graph.fingerprint()[:16], "weights": weights_digest(self._denoiser)[:16],
            "pipeline": type(generation.pipe).__name__, "scheduler": repr(generation.pipe.scheduler.config),
            "steps": str(generation.num_inference_steps), "guidance scale": f"{generation.guidance_scale:g}",
            "seed": str(generation.seed), "options": repr(sorted(generation.options.items())),
            "prompts": source.prompts_sha256[:16], "precision of the errors": repr(self._errors),
            "tables": self._tables_for, "threads": str(self._threads), "rounds": str(self._rounds),
            "backend": self._backend,
            "device": source.device, "dtype": str(next(self._denoiser.parameters()).dtype),
            "versions": repr(sorted(source.versions.items())),
        }

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
