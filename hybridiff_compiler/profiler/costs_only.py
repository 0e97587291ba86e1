"""Profiles of costs alone: no prompts, no images, no errors; enough to plan exact schedules and to predict times."""

from __future__ import annotations

import ast
import datetime
import math
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..backends.hoisted_sizes import with_hoisted
from ..backends.merging import merge_linears
from ..capture import flatten_call, unflatten_call
from ..ir import BRANCHES, Branch, CallSignature, LayerGraph, ModelInfo, Profile, Provenance, UsageError
from ..ir.versions import installed_versions
from ..runtime.segments import SegmentRunner
from .costs import LayerMethod
from .generate import FirstCall, Generation, prompts_digest
from .links import with_links
from .settling import Tables, measure_costs
from .timers import Alone, timers_for
from .timing import pinned_threads

__all__ = ["call_of_pipeline", "clocks_mhz", "cost_profile", "costs_of_pipeline", "model_info"]

Progress = Callable[[str, int, int], None]


def cost_profile(
    denoiser: nn.Module,
    call: Mapping[str, Any],
    tables: Tables,
    *,
    name: str,
    num_steps: int = 50,
    guidance_scale: float = 5.0,
    scheduler: str = "",
    backend: str = "eager",
    method: LayerMethod = "compiled",
    rounds: int = 15,
    max_rounds: int = 3,
    max_seconds: float = math.inf,
    threads: int | None = None,
    links: Sequence[str] = (),
    watched: FirstCall | None = None,
    seed: int = 0,
    random_weights: bool = False,
    jobs: int = 0,
    alone: Alone = nullcontext,
    on_note: Callable[[str], None] = lambda text: None,
    on_progress: Progress = lambda stage, done, total: None,
) -> Profile:
    """Measure layers, stages and links of a denoiser from one branch's call.

    Args:
        denoiser: the network, on the device that will run it.
        call: keyword arguments of one branch's call (a batch of one image).
        tables: from layer graph and layer times, the partitions and patterns to measure.
        name: of the model.
        num_steps, guidance_scale, scheduler: of the generations to plan for; noted.
        backend: `eager` or `inductor`.
        method: see `costs.measure_layers`.
        rounds: samples of each time.
        max_rounds, max_seconds: see `settling.measure_costs`.
        threads: CPU threads of one rank.
        links: devices between which links are measured, if there are two or more.
        watched: has seen a pipeline around the denoiser, for what that adds to a step.
        seed: noted.
        random_weights: noted.
        jobs: graphs are built and timed by so many processes (0: by this one).
        alone: opened around samples.
        on_note: called, from any thread, with what processes have built.
        on_progress: called with (stage of the session, done, total).

    Raises:
        UsageError, InputError: see `capture.capture`.
        WorkerError: links could not be measured.
    """
    began = time.monotonic()
    signature, leaves = flatten_call(denoiser, (), call)
    device = next(denoiser.parameters()).device
    inputs: dict[Branch, dict[str, torch.Tensor]] = {
        branch: {path: leaf.to(device) for path, leaf in leaves.items()} for branch in BRANCHES
    }
    with pinned_threads(threads), timers_for(
        denoiser, signature, inputs, jobs=jobs, threads=threads, alone=alone, on_note=on_note
    ) as timers:
        on_progress("capture", 0, 1)
        bare = SegmentRunner(denoiser, signature, (), ())
        on_progress("capture", 1, 1)
        if backend != "eager":  # before others see the weights, who would move copies of their own
            merge_linears(bare.captured(1).whole())
        measured = measure_costs(
            bare, inputs, tables, timers, backend=backend, method=method, rounds=rounds, max_rounds=max_rounds,
            max_seconds=max_seconds - (time.monotonic() - began), on_progress=on_progress,
        )
    with alone():
        costs = with_links(
            measured.costs if watched is None else watched.added_to(measured.costs), links, threads=threads or 1,
            on_progress=lambda done, total: on_progress("links", done, total),
        )
    from .session import device_name

    return Profile(
        model=model_info(denoiser, name, bare.layers, signature), graph=with_hoisted(bare.captured(1)), costs=costs,
        num_steps=num_steps,
        scheduler=scheduler or ("" if watched is None else watched.scheduler), guidance_scale=guidance_scale,
        partitions=measured.partitions, patterns=measured.patterns,
        provenance=Provenance(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), device=device_name(device),
            device_type="cuda" if device.type == "cuda" else "cpu", backend=backend,
            threads=threads if device.type == "cpu" else None,
            versions=installed_versions("torch", "diffusers", "hybridiff-compiler"), seed=seed, prompts=0,
            prompts_sha256=prompts_digest([]), random_weights=random_weights,
            clocks_mhz=clocks_mhz(device),
        ),
    )


def costs_of_pipeline(
    generation: Generation, prompt: str, tables: Tables, *, name: str, **options: Any
) -> Profile:
    """`cost_profile` of a pipeline's denoiser, at the call that the pipeline makes for `prompt`.

    Raises:
        InputError: the pipeline makes no guided call.
    """
    denoiser, call, first = call_of_pipeline(generation, prompt)
    return cost_profile(
        denoiser, call, tables, name=name, num_steps=first.num_steps, guidance_scale=generation.guidance_scale,
        scheduler=type(generation.pipe.scheduler).__name__, watched=first,
        seed=generation.seed, **options,
    )


def call_of_pipeline(generation: Generation, prompt: str) -> tuple[nn.Module, dict[str, Any], FirstCall]:
    """A pipeline's denoiser, the keyword arguments of its call for the branch of `prompt`, and who watched.

    Raises:
        InputError: the pipeline makes no guided call.
    """
    from ..runtime.intercept import find_denoiser

    first = FirstCall()
    generation.latents([prompt], first)
    signature, call = first.require()
    return find_denoiser(generation.pipe)[1], _nested(signature, call.inputs["cond"]), first


def _nested(signature: CallSignature, leaves: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Keyword arguments with these tensors in place of the signature's leaves."""
    constants = {
        leaf.path: ast.literal_eval(leaf.constant or "None") for leaf in signature.leaves if leaf.shape is None
    }
    return unflatten_call({leaf.path: {**constants, **leaves}[leaf.path] for leaf in signature.leaves})


def model_info(denoiser: nn.Module, name: str, graph: LayerGraph, signature: CallSignature) -> ModelInfo:
    """What a profile notes of a denoiser."""
    parameters = list(denoiser.parameters())
    if not parameters:
        raise UsageError(f"{type(denoiser).__name__} has no parameters; there is nothing to profile")
    return ModelInfo(
        name=name, denoiser=type(denoiser).__name__, fingerprint=graph.fingerprint(),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        dtype=str(parameters[0].dtype).removeprefix("torch."), signature=signature,
    )


def clocks_mhz(device: torch.device) -> dict[str, int]:
    """Clocks of a GPU now and at most, as its driver tells; empty where it does not, and for a CPU."""
    if device.type != "cuda":
        return {}
    fields = {"sm": "clocks.sm", "sm_max": "clocks.max.sm", "memory": "clocks.mem", "memory_max": "clocks.max.mem"}
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits",
             f"--id={torch.cuda.get_device_properties(device).uuid}"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout
        return {field: int(value) for field, value in zip(fields, told.splitlines()[0].split(","), strict=True)}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, AttributeError):
        return {}
