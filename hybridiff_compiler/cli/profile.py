"""`hybridiff profile`: measure a model once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="bundled:unet, bundled:mmdit, a local diffusers folder, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write (JSON).")],
    prompt: Annotated[list[str] | None, typer.Option(help="A calibration prompt; repeat for more.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one a line.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first so many prompts.")] = None,
    steps: Annotated[int | None, typer.Option(min=3, help="Denoising steps [default: 50].")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance scale [default: 5].")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Image height [default: the model's].")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Image width [default: the model's].")] = None,
    seed: Annotated[int, typer.Option(help="Prompt k starts from seed + k.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one rank.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="torch dtype [default: float32 on cpu, float16 on cuda].")] = None,
    errors_from: Annotated[Path | None, typer.Option(
        help="Take the errors over from this profile of the same generations; measure only costs here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few prompts and probes: rough curves in seconds.")] = False,
    json_mode: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure MODEL once: layer and stage times, guidance curve, image error of every cheap way to run a step."""
    from ..api import profile as measure
    from ..ir import Profile
    from ..report import describe_profile
    from .calls import call_options, check_device
    from .files import check_writable
    from .models import load_model
    from .output import opened
    from .prompts import choose_prompts

    check_device(device)
    check_writable(output)
    known = Profile.load(errors_from) if errors_from is not None else None
    with opened(json_mode) as out:
        loaded = load_model(model, device=device, dtype=dtype)
        chosen = choose_prompts(prompt, prompts, default=loaded.profiling_prompts, limit=limit)
        with out.progress() as on_progress:
            measured = measure(
                loaded.pipe, prompts=chosen, name=loaded.name,
                num_inference_steps=steps or loaded.num_inference_steps,
                guidance_scale=loaded.guidance_scale if guidance_scale is None else guidance_scale,
                seed=seed, threads=threads if device == "cpu" else None, quick=quick, errors_from=known,
                on_progress=on_progress,
                **call_options(loaded, height, width),
            )
        measured.save(output)
        out.result(
            *describe_profile(measured), f"\nwrote {output}",
            machine=lambda: {
                "schema": 1, "profile": str(output), "sha256": measured.digest(), "model": measured.model.name,
                "device": measured.provenance.device, "steps": measured.num_steps, "prompts": len(chosen),
                "layers": len(measured.graph.layers), "patterns": [pattern.name for pattern in measured.patterns],
            },
        )
