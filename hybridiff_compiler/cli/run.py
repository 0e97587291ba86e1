"""`hybridiff run`: one image by a plan or bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan, or a bundle that `hybridiff compile` wrote.")],
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="bundled:unet, bundled:mmdit, a local diffusers folder, or a hub id.")],
    prompt: Annotated[str, typer.Option(help="What the image shows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The image to write (.png, .jpg, .webp).")],
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; must be the plan's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(
        show_default="5", help="Classifier-free guidance scale.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Image height in pixels; must be the plan's.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Image width in pixels; must be the plan's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the starting noise.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads per rank.")] = 1,
    json_mode: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Generate one image of MODEL by PLAN, on as many processes as the plan has ranks."""
    from ..ir import Plan, write_atomically
    from .calls import check_finite
    from .files import check_image_path, check_writable
    from .models import load_for_plan
    from .output import opened
    from .prompts import choose_prompts

    check_finite(guidance_scale=guidance_scale)
    check_image_path(output)
    check_writable(output)
    (text,) = choose_prompts([prompt], None, default=(), limit=None)
    with opened(json_mode) as out:
        if plan.is_dir():
            from ..bundle import resolve_plan

            loaded_plan, backend = resolve_plan(plan)
        else:
            loaded_plan, backend = Plan.load(plan), None
        loaded = load_for_plan(model, loaded_plan)
        from ..profiler.generate import Generation
        from ..quality.coverage import check_covered
        from ..quality.measure import generate
        from ..report import to_image
        from ..runtime.parallelize import parallelize
        from .calls import call_options

        generation = Generation(
            pipe=loaded.pipe, num_inference_steps=steps or loaded_plan.num_steps,
            guidance_scale=loaded.guidance_scale if guidance_scale is None else guidance_scale, seed=seed,
            options=call_options(loaded, height, width),
        )
        check_covered(generation, loaded_plan, text)
        with out.progress() as on_progress:
            on_progress(f"starting {loaded_plan.world_size} ranks", 0, 1)
            with parallelize(
                loaded.pipe, loaded_plan, threads=threads if loaded_plan.ranks[0].device == "cpu" else None,
                backend=backend,
            ) as running:
                on_progress(f"starting {loaded_plan.world_size} ranks", 1, 1)
                on_progress("generating", 0, 1)
                sample = generate(generation, [text])
                executed = running.executed
                on_progress("generating", 1, 1)
        write_atomically(output, lambda file: to_image(sample.images[0]).save(file))
        out.result(
            f"wrote {output}   denoising loop {sample.loop_s:.3f} s on {loaded_plan.world_size} ranks",
            machine=lambda: {
                "schema": 1, "image": str(output), "prompt": text, "seed": seed, "ranks": loaded_plan.world_size,
                "steps": loaded_plan.num_steps, "latency_s": sample.loop_s, "call_s": sample.call_s,
                "executed": list(executed),
            },
        )
