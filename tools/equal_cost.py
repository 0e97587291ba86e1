"""The table "at equal cost": planned schedules beside simpler ones, in denoiser evaluations, predicted and measured.

    python tools/equal_cost.py profiles/cpu/unet.json bundled:unet --prompts 8 -o equal.json
    python tools/equal_cost.py profiles/cpu/unet.json bundled:unet --predict-only

A cost of 1/3 is a speed-up of 3 over one rank, which spends two evaluations per step. Contenders spend at least as much
as the planned schedule may (see `hybridiff_compiler.quality.equal_cost`). Measured by the single-device simulator;
--gpus says how many ranks the schedules are for, not how many are there.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer


def main(
    profile: Annotated[Path, typer.Argument(help="A profile with pattern errors.")],
    model: Annotated[str, typer.Argument(help="The model that it is about, e.g. bundled:unet.")],
    speedup: Annotated[list[float] | None, typer.Option(help="Costs are one over these; repeat [2, 3, 4, 5].")] = None,
    gpus: Annotated[int, typer.Option(min=1)] = 2,
    without: Annotated[list[str] | None, typer.Option(help="Families that the planner does not use.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps [default: the profile's].")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Another diffusers scheduler, by class name.")] = None,
    planned_only: Annotated[bool, typer.Option("--planned-only", help="No contenders.")] = False,
    predict_only: Annotated[bool, typer.Option("--predict-only", help="Measure nothing.")] = False,
    prompts: Annotated[int, typer.Option(min=1)] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Prompts simulated together.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    limit_s: Annotated[float | None, typer.Option(help="Begin no further row after so many seconds.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
) -> None:
    """Print one table per cost; write JSON after every row."""
    import torch
    from rich.console import Console

    from hybridiff_compiler.cli.models import load_model
    from hybridiff_compiler.ir import Profile
    from hybridiff_compiler.quality.equal_cost import Judge, use_scheduler, with_noise_levels
    from hybridiff_compiler.report.equal_cost_table import equal_cost_table

    began = time.monotonic()
    torch.backends.cudnn.allow_tf32 = False  # rounding would hide in the PSNR of nearly exact schedules
    known = Profile.load(profile)
    loaded = None if predict_only else load_model(model, device=device, dtype=known.model.dtype)
    levels = None
    if loaded is not None:
        known = with_noise_levels(known, loaded.pipe)
        levels = use_scheduler(loaded.pipe, scheduler)(steps or known.num_steps)
    judge = Judge(
        None if loaded is None else loaded.pipe, known, num_steps=steps, noise_levels=levels, gpus=gpus,
        without=tuple(without or ()), prompts=() if loaded is None else loaded.held_out_prompts[:prompts], batch=batch,
        options={} if loaded is None else loaded.options,
    )
    console = Console(width=200)
    tables: list[dict[str, Any]] = []
    for wanted in speedup or (2.0, 3.0, 4.0, 5.0):
        planned = judge.planned(wanted)
        rows = [] if planned is None else [planned]
        rows += [] if planned_only else judge.contenders(wanted)
        done = []
        tables.append({"speedup": wanted, "rows": done, "reachable": planned is not None})
        for row in rows:
            late = limit_s is not None and time.monotonic() - began > limit_s
            found = row if predict_only or late else judge.measured(row)
            done.append(asdict(found) | {"schedule": found.schedule, "steps": len(found.steps)})
            if output is not None:
                output.write_text(json.dumps({
                    "schema": 1, "model": model, "device": device, "gpus": gpus, "prompts": prompts,
                    "without": without or [], "num_steps": judge.num_steps,
                    "scheduler": scheduler or known.scheduler, "tables": tables,
                }, indent=1) + "\n")
        console.print(equal_cost_table(done, title=f"cost 1/{wanted:g} on {gpus} ranks, {judge.num_steps} steps"))


if __name__ == "__main__":
    typer.run(main)
