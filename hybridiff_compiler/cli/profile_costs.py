"""`hybridiff profile --costs-only`: times without images, also of architectures with random weights."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..ir import UsageError

if TYPE_CHECKING:
    from ..ir import LayerGraph, Link, ModelInfo, Profile

__all__ = ["CostOptions", "estimate_costs", "link_devices", "measure_costs_only", "parse_link", "with_measured_links"]


_MOST_JOBS = 8
"""As many graphs are built at first for two ranks."""


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """What the command line says about costs."""

    device: str
    dtype: str | None
    backend: str | None
    threads: int | None
    gpus: int | None
    steps: int | None
    guidance_scale: float | None
    seed: int
    quick: bool
    random_weights: bool
    jobs: int | None
    max_seconds: float = math.inf
    link: Link | None = None
    """Between the GPUs that will run it, where stages shall recompute cheap values."""


def measure_costs_only(model: str, options: CostOptions, call_options: Any, on_progress: Any) -> Profile:
    """The profile of costs of MODEL; with random weights the name of an architecture.

    Args:
        model: as on the command line.
        options: see `CostOptions`.
        call_options: function from the loaded model to the keyword arguments of a pipeline call.
        on_progress: called with (stage, done, total).
    """
    from ..api import profile_costs

    common: dict[str, Any] = {
        "backend": options.backend, "threads": options.threads, "seed": options.seed, "quick": options.quick,
        "gpus": _worlds(options.gpus), "links": link_devices(options.device, options.gpus, options.quick),
        "link": options.link,
        "on_progress": on_progress, "jobs": _jobs(options), "max_seconds": options.max_seconds,
    }
    if options.random_weights:
        from ..quality.denoisers import random_denoiser
        from ..quality.overheads import watched_pipeline

        built = random_denoiser(model, device=options.device, dtype=options.dtype, seed=options.seed)
        return profile_costs(
            built.denoiser, call=built.call, watched=watched_pipeline(model, built.denoiser), name=model,
            random_weights=True, num_inference_steps=options.steps or built.spec.steps,
            guidance_scale=_or(options.guidance_scale, built.spec.guidance_scale), **common,
        )
    from .models import load_model

    loaded = load_model(model, device=options.device, dtype=options.dtype)
    return profile_costs(
        loaded.pipe, name=loaded.name, prompt=(*loaded.profiling_prompts, "a photograph")[0],
        num_inference_steps=options.steps or loaded.num_inference_steps,
        guidance_scale=_or(options.guidance_scale, loaded.guidance_scale), **common, **call_options(loaded),
    )


def estimate_costs(
    model: str, kind: str, fit: Profile | None, options: CostOptions, call_options: Any
) -> Profile:
    """The profile of MODEL as it would be on GPUs of a kind that is not at hand.

    Args:
        model: as on the command line; the name of the model that `fit` is of needs no model at hand either.
        kind: see `profiler.devices.DEVICES`.
        fit: a measured profile to take efficiencies from.
        options: see `CostOptions`.
        call_options: function from the loaded model to the keyword arguments of a pipeline call.

    Raises:
        UsageError: unknown kind.
        InputError: `fit` is an estimate, or of an unknown device.
    """
    from ..planner import candidate_partitions, measured_patterns
    from ..profiler.devices import find_device
    from ..profiler.roofline import estimate_profile

    device, worlds = find_device(kind), _worlds(options.gpus)

    def tables(graph: Any, seconds: Any) -> Any:
        partitions = candidate_partitions(graph, seconds, worlds)
        return partitions, measured_patterns(partitions, worlds)

    steps, scale, scheduler = options.steps or 50, _or(options.guidance_scale, 5.0), ""
    random_weights = options.random_weights
    if fit is not None and fit.model.name == model:
        info, graph, random_weights = fit.model, fit.graph, fit.provenance.random_weights
        steps, scale = options.steps or fit.num_steps, _or(options.guidance_scale, fit.guidance_scale)
        scheduler = fit.scheduler
    else:
        info, graph = _captured(model, options, call_options)
    return estimate_profile(
        info, graph, device, tables, ranks=options.gpus or 2, fit=fit, num_steps=steps, guidance_scale=scale,
        scheduler=scheduler, random_weights=random_weights,
    )


def _captured(model: str, options: CostOptions, call_options: Any) -> tuple[ModelInfo, LayerGraph]:
    """The layer graph of MODEL in the dtype that it would have on a GPU."""
    from ..backends.hoisted_sizes import with_hoisted
    from ..capture import capture
    from ..profiler.costs_only import call_of_pipeline, model_info

    if options.random_weights:
        from ..quality.denoisers import DENOISERS, random_denoiser

        dtype = options.dtype or (DENOISERS[model].dtype if model in DENOISERS else None)
        built = random_denoiser(model, device="meta", dtype=dtype, seed=options.seed)
        denoiser, call = built.denoiser, built.call
    else:
        from ..profiler import Generation
        from .models import load_model

        loaded = load_model(model, device=options.device, dtype=options.dtype)
        generation = Generation(
            pipe=loaded.pipe, num_inference_steps=3, guidance_scale=_or(options.guidance_scale, loaded.guidance_scale),
            options=call_options(loaded),
        )
        denoiser, call, _ = call_of_pipeline(generation, (*loaded.profiling_prompts, "a photograph")[0])
    captured = capture(denoiser, (), call)
    return model_info(denoiser, model, captured.layers, captured.signature), with_hoisted(captured)


def with_measured_links(profile: Profile, options: CostOptions, on_progress: Any) -> Profile:
    """`profile` with links between the devices that the options ask for."""
    from ..profiler.links import with_links

    costs = with_links(
        profile.costs, link_devices(options.device, options.gpus, options.quick), threads=options.threads or 1,
        on_progress=lambda done, total: on_progress("links", done, total),
    )
    return profile.model_copy(update={"costs": costs})


def parse_link(text: str | None) -> Link | None:
    """`latency in microseconds,bandwidth in GB/s`, e.g. `12,260`.

    Raises:
        UsageError: the text is no such pair.
    """
    from ..ir import Link

    if text is None:
        return None
    try:
        microseconds, rate = (float(word) for word in text.split(","))
        return Link(source=0, target=1, latency_s=microseconds * 1e-6, bytes_per_s=rate * 1e9)
    except ValueError:
        raise UsageError(
            f"got --link {text!r}; give the latency in microseconds and the bandwidth in GB/s, e.g. 12,260"
        ) from None


def link_devices(device: str, gpus: int | None, quick: bool) -> Sequence[str]:
    """Devices between which links are measured: ranks 0 to `gpus - 1`; by default all GPUs, or two CPU processes.

    Raises:
        UsageError: more GPUs than the machine has.
    """
    if quick and gpus is None:
        return ()
    if device == "cpu":
        return ("cpu",) * (2 if gpus is None else gpus)
    import torch

    present = torch.cuda.device_count()
    if gpus is not None and gpus > present:
        raise UsageError(f"got --gpus {gpus}, this machine has {present}; links can be measured between those only")
    return tuple(f"cuda:{index}" for index in range(present if gpus is None else gpus))


def _jobs(options: CostOptions) -> int:
    """Processes that build graphs: half of the cores' number, where there is something to compile for long."""
    if options.jobs is not None:
        return options.jobs
    if options.device == "cpu" or options.backend == "eager":
        return 0
    return max(1, min(_MOST_JOBS, (os.cpu_count() or 2) // 2))


def _worlds(gpus: int | None) -> tuple[int, ...]:
    return tuple(sorted({1, 2, *(() if gpus is None else (gpus,))}))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
