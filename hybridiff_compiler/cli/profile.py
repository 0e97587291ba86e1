"""`hybridiff profile`: measure a model once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..ir import Profile
    from .output import Output

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="bundled:unet, bundled:mmdit, a local diffusers folder, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write (JSON).")],
    prompt: Annotated[list[str] | None, typer.Option(help="A calibration prompt; repeat for more.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one a line.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first so many prompts.")] = None,
    steps: Annotated[int | None, typer.Option(min=3, show_default="50", help="Denoising steps.")] = None,
    guidance_scale: Annotated[list[float] | None, typer.Option(
        show_default="5", help="Classifier-free guidance scale; repeat to record the discrepancy at more scales.")
    ] = None,
    height: Annotated[int | None, typer.Option(
        min=8, show_default="the model's", help="Image height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(
        min=8, show_default="the model's", help="Image width in pixels.")] = None,
    seed: Annotated[int, typer.Option(help="Prompt k starts from seed + k.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one rank.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(
        show_default="float32 on cpu, float16 on cuda", help="float32, float16 or bfloat16.")] = None,
    errors_from: Annotated[Path | None, typer.Option(
        help="Take the errors over from this profile of the same generations; measure only costs here.")] = None,
    cuts_from: Annotated[Path | None, typer.Option(
        help="Measure the tables of this profile anew: with its seed, errors come out the same.")] = None,
    costs_only: Annotated[bool, typer.Option(
        "--costs-only", help="Only times: layers, stages and links; no images, no errors.")] = False,
    random_weights: Annotated[bool, typer.Option(
        "--random-weights", help="MODEL names an architecture (sdxl, sd3, pixart, flux, wan); with --costs-only.")
    ] = False,
    gpus: Annotated[int | None, typer.Option(
        min=1, show_default="all GPUs; 2 processes on cpu", help="Measure links between so many ranks.")] = None,
    link: Annotated[str | None, typer.Option(
        metavar="US,GBS", help="Between the GPUs that will run it, e.g. 12,260 (microseconds, GB/s): stages then "
        "compute cheap values themselves that would take longer to arrive.")] = None,
    backend: Annotated[str | None, typer.Option(
        show_default="inductor on cuda, eager on cpu", help="What will run the stages: eager or inductor.")] = None,
    jobs: Annotated[int | None, typer.Option(
        min=0, max=256, show_default="up to 8 on cuda",
        help="With --costs-only: processes that compile and time.")] = None,
    max_seconds: Annotated[float | None, typer.Option(
        min=1, help="With --costs-only: build nothing more after this; the profile says what it lacks.")] = None,
    estimate: Annotated[str | None, typer.Option(
        help="Estimate the times on another kind of GPU instead: h100, a100, l40s, rtx4090, rtx3090, ...")] = None,
    fit: Annotated[Path | None, typer.Option(
        help="With --estimate: take efficiencies from this measured profile.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few prompts and probes: rough curves in seconds.")] = False,
    full: Annotated[bool, typer.Option(
        "--full", help="Errors of every step on every prompt, nothing interpolated: several times the work.")] = False,
    trends: Annotated[bool, typer.Option(
        "--trends", help="Measure steps that extrapolate earlier estimates, too: plans of them are predicted badly.")
    ] = False,
    restart: Annotated[bool, typer.Option(
        "--restart", help="Begin anew, whatever an unfinished run has left beside the output.")] = False,
    json_mode: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure MODEL once: layer and stage times, guidance curve, image error of every cheap way to run a step.

    What is finished is kept in OUTPUT.partial; the same command continues a stopped run from there.
    """
    from ..api import profile as measure
    from ..ir import Profile, UsageError, is_special
    from .calls import call_options, check_backend, check_device
    from .files import check_writable
    from .models import load_model
    from .output import opened
    from .profile_costs import CostOptions, estimate_costs, measure_costs_only, parse_link, with_measured_links
    from .prompts import choose_prompts

    check_device(device)
    check_backend(backend)
    check_writable(output)
    if random_weights and not costs_only and estimate is None:
        raise UsageError("random weights make no images to judge errors by; add --costs-only")
    if fit is not None and estimate is None:
        raise UsageError("--fit says what an estimate is fitted on; add --estimate KIND, or drop it")
    known = Profile.load(errors_from) if errors_from is not None else None
    if link is not None and estimate is not None:
        raise UsageError("an estimate knows its links by the kind of GPU; drop --link")
    between = parse_link(link)
    options = CostOptions(
        device=device, dtype=dtype, backend=backend, threads=threads if device == "cpu" else None, gpus=gpus,
        steps=steps, guidance_scale=guidance_scale[0] if guidance_scale else None, seed=seed, quick=quick,
        random_weights=random_weights, jobs=jobs, max_seconds=max_seconds or math.inf, link=between,
    )
    partial = None if is_special(output) else output.with_name(f"{output.name}.partial")
    if restart and partial is not None:
        partial.unlink(missing_ok=True)
    with opened(json_mode) as out:
        if estimate is not None:
            fitted = None if fit is None else Profile.load(fit)
            estimated = estimate_costs(
                model, estimate, fitted, options, lambda loaded: call_options(loaded, height, width)
            )
            _finish(out, estimated, output)
            return
        if costs_only:
            with out.progress() as on_progress:
                measured = measure_costs_only(
                    model, options, lambda loaded: call_options(loaded, height, width), on_progress
                )
            _finish(out, measured, output)
            return
        loaded = load_model(model, device=device, dtype=dtype)
        chosen = choose_prompts(prompt, prompts, default=loaded.profiling_prompts, limit=limit)
        with out.progress() as on_progress:
            measured = measure(
                loaded.pipe, prompts=chosen, name=loaded.name,
                num_inference_steps=steps or loaded.num_inference_steps,
                guidance_scale=guidance_scale or loaded.guidance_scale,
                seed=seed, threads=threads if device == "cpu" else None, quick=quick, full=full, trends=trends,
                errors_from=known,
                cuts_from=None if cuts_from is None else Profile.load(cuts_from),
                backend=backend, partial=partial, link=between, on_progress=on_progress,
                **call_options(loaded, height, width),
            )
            measured = with_measured_links(measured, options, on_progress)
        _finish(out, measured, output)


def _finish(out: Output, measured: Profile, output: Path) -> None:
    from ..report import describe_profile

    measured.save(output)
    out.result(
        *describe_profile(measured), f"\nwrote {output}",
        machine=lambda: {
            "schema": 1, "profile": str(output), "sha256": measured.digest(), "model": measured.model.name,
            "device": measured.provenance.device, "steps": measured.num_steps, "prompts": measured.provenance.prompts,
            "layers": len(measured.graph.layers), "patterns": [pattern.name for pattern in measured.patterns],
        },
    )
