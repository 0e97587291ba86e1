"""Improve a planned schedule by measurement on the profiling prompts, and judge it on held-out ones.

    python tools/refine_schedule.py PROFILE bundled:mmdit --gpus 4 --speedup 8 --tries 300 --device cuda -o refined.json

Predictions are coarse below about 32 dB; here neighbouring schedules of at most the same cost are generated and kept
where they are better (`hybridiff_compiler.quality.refine`). Prints and writes the planned and the refined schedule,
both measured on the prompts that it was fitted to and on held-out ones.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def main(
    profile: Annotated[Path, typer.Argument(help="A profile with pattern errors.")],
    model: Annotated[str, typer.Argument(help="The bundled model that it is about.")],
    speedup: Annotated[float, typer.Option(help="In denoiser evaluations, over one rank.")] = 8.0,
    gpus: Annotated[int, typer.Option(min=1)] = 4,
    without: Annotated[list[str] | None, typer.Option(help="Families that the planner does not use.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Where to start [default: the planned one].")] = None,
    tries: Annotated[int, typer.Option(min=1, help="Schedules to measure.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the moves.")] = 0,
    fit_prompts: Annotated[int, typer.Option(min=1, help="Profiling prompts to fit to.")] = 24,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts to judge by.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Prompts simulated together.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
) -> None:
    """Print both schedules and what they were measured at."""
    import torch
    from rich.console import Console

    from hybridiff_compiler import reference_models
    from hybridiff_compiler.cli.models import load_model
    from hybridiff_compiler.ir import Profile, TargetError, parse_steps
    from hybridiff_compiler.planner import family_of
    from hybridiff_compiler.quality.equal_cost import Judge, with_noise_levels
    from hybridiff_compiler.quality.refine import refine

    torch.backends.cudnn.allow_tf32 = False  # as tools/equal_cost.py
    known = Profile.load(profile)
    loaded = load_model(model, device=device, dtype=known.model.dtype)
    known = with_noise_levels(known, loaded.pipe)

    def judge(on: list[str]) -> Judge:
        return Judge(
            loaded.pipe, known, gpus=gpus, without=tuple(without or ()), prompts=on, batch=batch,
            options=loaded.options,
        )

    fitting = judge(list(reference_models.PROFILING_PROMPTS)[:fit_prompts])
    start = fitting.planned(speedup) if schedule is None else fitting.row("start", speedup, parse_steps(schedule))
    if start is None:
        raise TargetError(f"no schedule on {gpus} GPUs is {speedup:g}x as fast as one; ask for less")
    cheap = [p.name for p in fitting.free_patterns if family_of(p.name) not in (without or ())]
    console = Console()
    with console.status("measuring") as status:
        found = refine(
            fitting, start, patterns=cheap, tries=tries, seed=seed,
            on_progress=lambda done, total, best: status.update(f"{done} of {total} schedules, best {best:.2f} dB"),
        )
    held_out = judge(list(loaded.held_out_prompts[:prompts]))
    rows = []
    for row in (start, found):
        fitted, judged = fitting.measured(row), held_out.measured(row)
        rows.append(asdict(judged) | {"schedule": row.schedule, "fitted_psnr_db": fitted.psnr_db})
        console.print(
            f"{row.name}: {row.work_speedup:.2f}x, {fitted.psnr_db:.2f} dB on the {fit_prompts} prompts it was fitted "
            f"to, {judged.psnr_db:.2f} dB on {prompts} held-out ones: {row.schedule}"
        )
    if output is not None:
        output.write_text(json.dumps({
            "schema": 1, "kind": "refined-schedule", "model": model, "device": device, "gpus": gpus,
            "speedup": speedup, "tries": tries, "fit_prompts": fit_prompts, "prompts": prompts, "rows": rows,
        }, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
