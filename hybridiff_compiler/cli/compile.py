"""`hybridiff compile`: a plan and its stage graphs, compiled ahead, as one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan that `hybridiff plan` wrote.")],
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="bundled:unet, bundled:mmdit, a local diffusers folder, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; an older bundle is replaced.")],
    backend: Annotated[str | None, typer.Option(
        show_default="the strongest one here", help="aotinductor, onnx, tensorrt or tensorrt-rtx.")] = None,
    target: Annotated[str | None, typer.Option(
        show_default="this machine's", help="GPU to build for: sm_89 and the like, or CURRENT.")] = None,
    jobs: Annotated[int | None, typer.Option(
        "--jobs", "-j", min=1, max=256, show_default="as cores and memory allow",
        help="Processes that compile.")] = None,
    json_mode: Annotated[bool, typer.Option("--json", help="Print the manifest as one JSON object.")] = False,
) -> None:
    """Compile every stage graph of PLAN for MODEL, so that running it compiles nothing."""
    from ..ir import Plan
    from .output import opened

    with opened(json_mode) as out:
        loaded_plan = Plan.load(plan)
        from ..backends.artifact import artifact_backend, strongest_backend
        from ..bundle import write_bundle
        from ..bundle.writing import check_destination
        from ..report.describe_bundle import describe_bundle
        from ..runtime.intercept import find_denoiser
        from .models import load_model

        device = loaded_plan.ranks[0].device
        chosen = backend or strongest_backend(device)
        check_destination(output)
        artifact_backend(chosen).target(device, loaded_plan.model.dtype, target)  # refused before the model is loaded
        if backend is None:
            out.remark(f"backend {chosen}, the strongest one for {device} here")
        # Engines are built for another machine's GPU where this one has none.
        at = device if chosen == "aotinductor" or _has(device) else "cpu"
        loaded = load_model(model, device=at, dtype=loaded_plan.model.dtype)
        _, denoiser = find_denoiser(loaded.pipe)
        with out.progress() as on_progress:
            bundle = write_bundle(
                loaded_plan, denoiser, output, backend=chosen, arch=target, jobs=jobs, on_progress=on_progress
            )
        out.result(
            *describe_bundle(bundle), f"\nwrote {output}", machine=lambda: bundle.manifest.model_dump(mode="json")
        )


def _has(device: str) -> bool:
    import torch

    return device == "cpu" or torch.cuda.is_available()
