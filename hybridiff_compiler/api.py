"""The Python API: profile, plan and parallelize a diffusers pipeline."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .ir import LayerGraph, Link, Partition, Pattern, PlanMismatchError, Profile, Redundancy, UsageError

__all__ = ["profile", "profile_costs"]


def profile(
    pipe: Any,
    *,
    prompts: Sequence[str],
    name: str | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float | Sequence[float] = 5.0,
    seed: int = 0,
    threads: int | None = None,
    probes: int = 4,
    images_per_batch: int = 8,
    quick: bool = False,
    full: bool = False,
    trends: bool = False,
    gpus: Iterable[int] = (1, 2, 4),
    link: Link | None = None,
    errors_from: Profile | None = None,
    cuts_from: Profile | None = None,
    backend: str | None = None,
    partial: Path | None = None,
    helpers: int | None = None,
    on_progress: Any = None,
    **options: Any,
) -> Profile:
    """Measure a pipeline once: layer and stage times, discrepancy curves, and the image error of every cheap pattern.

    Of partitions that are about as fast, those are measured whose values change least from step to step; that is found
    out first, in generations of two prompts.

    Args:
        pipe: a diffusers pipeline on the device that will run it; it is not changed.
        prompts: calibration prompts; prompt k is generated from `seed + k`. A dozen or more for a profile to trust.
        name: how the profile names the model (default: the pipeline's name or path).
        num_inference_steps: denoising steps of the generations to plan for.
        guidance_scale: classifier-free guidance scale (above 1). Of several, the first one is that of the profile; at
            the others the discrepancy is recorded.
        seed: seeds prompts and probes; equal seeds give equal error curves.
        threads: CPU threads of one rank, used for timing only (None: as torch is set).
        probes: random image directions per prompt for the propagation of errors.
        images_per_batch: prompts generated together while errors are recorded.
        quick: at most four prompts, two probes and few steps and ages: minutes become seconds, curves become rough.
        full: errors of every step and more ages, on all prompts (several times the work; for GPUs). The default
            measures every third step and the first and last ones, three ages and eight prompts, and interpolates.
        trends: whether steps that extrapolate earlier estimates are measured, too. Errors add up in plans of such steps
            in ways that are predicted badly.
        gpus: the numbers of GPUs to plan for later: their ways to run a step are measured.
        link: between the GPUs that will run it, if stages shall recompute cheap layers whose values take longer to
            arrive over it (default: they receive everything).
        errors_from: a profile of the same generations made on another device; only costs are measured then.
        cuts_from: a profile of the same denoiser whose partitions and patterns are measured anew, on the schedules that
            were tried for it, instead of ones that follow this session's times. With its seed and prompts the error
            curves then reproduce exactly.
        backend: what stages are timed with, `eager` or `inductor` (default: inductor on CUDA, eager elsewhere).
        partial: file for the state of an unfinished session: written as parts finish, continued when it exists, deleted
            at the end.
        helpers: processes that share the work on the errors with this one, each with a copy of the pipeline (default:
            one per further core, three at most, on a CPU with a pipeline of up to 1 GiB; else none).
        on_progress: called with (stage, done, total).
        **options: further keyword arguments of the pipeline call (height, width, negative_prompt, ...).

    Raises:
        UsageError: no prompts, a number of steps below 3, or a number of GPUs or processes out of range.
        InputError: the pipeline makes no guided calls, has no decoder, or its scheduler is stochastic.
        PlanMismatchError: `errors_from` or `cuts_from` is not for these generations, or `partial` is of another
            session.
    """
    from .planner import candidate_partitions, measured_patterns
    from .planner.sampling import trial_schedules
    from .planner.worlds import check_gpus
    from .profiler import ErrorSettings, Generation, ProfileSession
    from .profiler.grid import FULL, QUICK, THINNED
    from .profiler.processes import check_count
    from .runtime.intercept import find_denoiser

    if num_inference_steps < 3:
        raise UsageError(f"got {num_inference_steps} steps; a schedule needs at least 3")
    if quick and full:
        raise UsageError("got quick and full; give one of them")
    if helpers is not None:
        check_count("helpers", helpers)
    worlds = tuple(gpus)
    for world in worlds:
        check_gpus(world)
    scales = [guidance_scale] if isinstance(guidance_scale, int | float) else list(guidance_scale)
    if not scales:
        raise UsageError("got no guidance scale; give one above 1")
    prompts = list(prompts)[:4] if quick else list(prompts)
    session = ProfileSession(
        Generation(
            pipe=pipe, num_inference_steps=num_inference_steps, guidance_scale=scales[0], seed=seed, options=options,
        ),
        prompts,
        name=name or str(getattr(pipe, "name_or_path", "") or type(pipe).__name__),
        threads=threads,
        errors=ErrorSettings(
            probes=min(probes, 2) if quick else probes, images_per_batch=images_per_batch,
            curve_prompts=max(1, len(prompts)) if full else 8, grid=FULL if full else QUICK if quick else THINNED,
        ),
        guidance_scales=scales[1:],
        rounds=5 if quick else 15,
        backend=_backend(find_denoiser(pipe)[1], backend),
        partial=partial,
        helpers=_helpers(pipe) if helpers is None else helpers,
        tables_for=f"GPUs {worlds}" + (", trends" if trends else "") + (f", link {link}" if link is not None else "")
        + (f", cuts of {cuts_from.digest()[:16]}" if cuts_from is not None else ""),
        on_progress=on_progress,
    )

    def tables(
        graph: LayerGraph, costs: Sequence[float], redundancy: Redundancy | None
    ) -> tuple[tuple[Partition, ...], tuple[Pattern, ...]]:
        if cuts_from is not None:
            if cuts_from.model.fingerprint != graph.fingerprint():
                raise PlanMismatchError("cuts cannot be taken over from a profile of another denoiser or size")
            return cuts_from.partitions, cuts_from.patterns
        change = None if redundancy is None else redundancy.mean
        partitions = candidate_partitions(graph, costs, worlds, link=link, change=change)
        return partitions, measured_patterns(partitions, worlds, trends=trends)

    def timed(profile: Profile) -> Profile:  # which schedules are tried follows times, too
        return profile if cuts_from is None else profile.model_copy(update={"costs": cuts_from.costs})

    return session.measure(
        tables, lambda profile: trial_schedules(timed(profile), random=3 if quick else 10, seed=seed),
        errors_from, survey=cuts_from is None,
    )


def profile_costs(
    model: Any,
    *,
    call: Mapping[str, Any] | None = None,
    prompt: str = "a photograph",
    name: str | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 5.0,
    backend: str | None = None,
    layer_method: Literal["compiled", "eager"] = "compiled",
    threads: int | None = None,
    seed: int = 0,
    quick: bool = False,
    max_seconds: float = math.inf,
    gpus: Iterable[int] = (1, 2),
    link: Link | None = None,
    links: Sequence[str] = (),
    random_weights: bool = False,
    jobs: int = 0,
    watched: Any = None,
    alone: Any = None,
    on_progress: Any = None,
    on_note: Any = None,
    **options: Any,
) -> Profile:
    """Measure only times: layers, stage graphs and links. No image is made, and plans from it are exact or free of a
    quality target.

    Args:
        model: a diffusers pipeline; or, with `call`, a denoiser.
        call: keyword arguments of one branch's call of the denoiser.
        prompt: what the pipeline is called with.
        name: how the profile names the model.
        num_inference_steps, guidance_scale: of the generations to plan for.
        backend: `eager` or `inductor` (default: inductor on CUDA, eager elsewhere).
        layer_method: `compiled` marks layers inside the compiled whole, `eager` inside the uncompiled one, which saves
            one compilation.
        threads: CPU threads of one rank.
        seed: of the pipeline's call; noted.
        quick: fewer repeats, and stages are not re-measured after partitions moved.
        max_seconds: after which nothing more is built; the profile then names what it lacks.
        gpus: the numbers of GPUs to plan for later: stages of their partitions are measured.
        link: between the GPUs that will run it, if stages shall recompute cheap layers whose values take longer to
            arrive over it (default: they receive everything).
        links: devices between which links are measured, e.g. `("cuda:0", "cuda:1")`.
        random_weights: whether the weights are; noted.
        jobs: graphs are built and timed by so many processes, which share the denoiser's memory (0: by this one).
        watched: with `call`, a `profiler.generate.FirstCall` that has seen a pipeline around the denoiser, for what
            that adds to a step.
        alone: context manager factory opened around samples, to keep others off the machine meanwhile.
        on_progress: called with (stage, done, total).
        on_note: called, from any thread, with what those processes have built.
        **options: further keyword arguments of the pipeline call.

    Raises:
        UsageError: a bare denoiser without `call`, or a number of GPUs or processes out of range.
        InputError: the denoiser cannot be captured, or the pipeline makes no guided call.
        WorkerError: a rank failed while links were measured.
    """
    from contextlib import nullcontext

    from torch import nn

    from .planner import candidate_partitions, measured_patterns
    from .planner.worlds import check_gpus
    from .profiler import Generation
    from .profiler.costs_only import cost_profile, costs_of_pipeline
    from .profiler.processes import check_count
    from .runtime.intercept import find_denoiser

    check_count("jobs", jobs)
    worlds = tuple(gpus)
    for world in worlds:
        check_gpus(world)
    if call is None and isinstance(model, nn.Module):
        raise UsageError("got a denoiser without an example call; pass call={...}, one branch's keyword arguments")
    denoiser = model if call is not None else find_denoiser(model)[1]
    def tables(graph: LayerGraph, costs: Sequence[float]) -> tuple[tuple[Partition, ...], tuple[Pattern, ...]]:
        partitions = candidate_partitions(graph, costs, worlds, link=link)
        return partitions, measured_patterns(partitions, worlds)

    chosen: dict[str, Any] = {
        "backend": _backend(denoiser, backend), "method": layer_method, "threads": threads,
        "rounds": 5 if quick else 15,
        "max_rounds": 1 if quick else 3, "max_seconds": max_seconds,
        "links": links, "random_weights": random_weights, "jobs": jobs,
        "on_note": on_note or (lambda text: None), "alone": alone or nullcontext,
        "on_progress": on_progress or (lambda stage, done, total: None),
    }
    named = name or str(getattr(model, "name_or_path", "") or type(model).__name__)
    if call is not None:
        return cost_profile(
            denoiser, call, tables, name=named, num_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed,
            watched=watched, **chosen,
        )
    generation = Generation(
        pipe=model, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed, options=options,
    )
    return costs_of_pipeline(generation, prompt, tables, name=named, **chosen)


def _backend(denoiser: Any, wanted: str | None) -> str:
    """What will run on the denoiser's device unless the user says otherwise."""
    if wanted is not None:
        return wanted
    return "inductor" if next(denoiser.parameters()).device.type == "cuda" else "eager"


def _helpers(pipe: Any) -> int:
    """How many processes may share the work on a pipeline's errors with this one."""
    from torch import nn

    parts = [part for part in getattr(pipe, "components", {}).values() if isinstance(part, nn.Module)]
    weights = [parameter for part in parts for parameter in part.parameters()]
    if any(weight.device.type != "cpu" for weight in weights) or sum(weight.nbytes for weight in weights) > 1 << 30:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(3, cores - 1)
