"""`hybridiff refine`: a plan's schedule improved by measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan that `hybridiff plan` wrote.")],
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="The profile that it was made from.")],
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="bundled:unet, bundled:mmdit, a local diffusers folder, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan to write (JSON).")],
    tries: Annotated[int, typer.Option(min=1, help="Schedules to measure.")] = 150,
    seconds: Annotated[float | None, typer.Option(min=0, help="After which no further one is tried.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to fit to; repeat for more.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one a line.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use only the first so many prompts.")] = 16,
    guidance_scale: Annotated[float | None, typer.Option(show_default="the profile's", help="Guidance scale.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Image height in pixels; must be the plan's.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Image width in pixels; must be the plan's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search; prompt k starts from seed + k.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, show_default="as torch chooses", help="CPU threads.")] = None,
    json_mode: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object.")] = False,
) -> None:
    """Improve PLAN's schedule at no more cost, by measuring neighbouring schedules on prompts (on one device)."""
    import math

    from ..ir import Plan, Profile
    from .calls import call_options, check_finite
    from .files import check_writable
    from .models import load_for_plan
    from .output import opened
    from .prompts import choose_prompts

    check_finite(guidance_scale=guidance_scale, seconds=seconds)
    check_writable(output)
    with opened(json_mode) as out:
        given, known = Plan.load(plan), Profile.load(profile)
        loaded = load_for_plan(model, given)
        chosen = choose_prompts(prompt, prompts, default=loaded.profiling_prompts, limit=limit)
        from ..profiler.timing import pinned_threads
        from ..quality.refine import refine_plan
        from ..report import describe_plan

        with out.progress() as on_progress, pinned_threads(threads):
            better = refine_plan(
                given, known, loaded.pipe, prompts=chosen, tries=tries,
                seconds=math.inf if seconds is None else seconds, guidance_scale=guidance_scale, seed=seed,
                on_progress=on_progress, **call_options(loaded, height, width),
            )
        out.result(
            *describe_plan(better), f"\nwrote {better.save(output)}", machine=lambda: better.model_dump(mode="json"),
        )
