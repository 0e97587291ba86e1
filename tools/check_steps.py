"""How well a profile predicts other numbers of steps: plans from it, measured with the single-device simulator.

    python tools/check_steps.py profiles/cpu/unet.json bundled:unet --steps 25 --steps 100 --prompts 8 -o check.json

For every number of steps and every speed-up (in denoiser evaluations) the planned schedule runs on held-out prompts;
its mean PSNR against the exact run of equally many steps, and the lowest 5 % of the prompts, stand beside the
predictions. With --at-its-own the profile's own number of steps is measured too: what is left of the error then is not
due to the step count.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer


def main(
    profile: Annotated[Path, typer.Argument(help="A profile with pattern errors.")],
    model: Annotated[str, typer.Argument(help="The model that it is about, e.g. bundled:unet.")],
    steps: Annotated[list[int] | None, typer.Option(help="Numbers of steps; repeat for more.")] = None,
    speedup: Annotated[list[float] | None, typer.Option(help="In denoiser evaluations; repeat for more.")] = None,
    at_its_own: Annotated[bool, typer.Option("--at-its-own", help="Also the profile's own number of steps.")] = False,
    without: Annotated[list[str] | None, typer.Option(help="Families of patterns not to use.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Another diffusers scheduler, by class name.")] = None,
    gpus: Annotated[int, typer.Option(min=1)] = 2,
    prompts: Annotated[int, typer.Option(min=1)] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Prompts simulated together.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
) -> None:
    """Print predicted and measured PSNR per number of steps and speed-up."""
    import torch

    from hybridiff_compiler.cli.models import load_model
    from hybridiff_compiler.ir import Profile
    from hybridiff_compiler.quality.equal_cost import Judge, use_scheduler, with_noise_levels

    torch.backends.cudnn.allow_tf32 = False  # rounding would hide in the PSNR of nearly exact schedules
    known = Profile.load(profile)
    loaded = load_model(model, device=device, dtype=known.model.dtype)
    known = with_noise_levels(known, loaded.pipe)
    levels_of = use_scheduler(loaded.pipe, scheduler)
    rows: list[dict[str, Any]] = []
    for count in [*(steps or (25, 100)), *([known.num_steps] if at_its_own else [])]:
        judge = Judge(
            loaded.pipe, known, num_steps=count, noise_levels=levels_of(count), gpus=gpus, without=tuple(without or ()),
            prompts=loaded.held_out_prompts[:prompts], batch=batch, guidance_scale=known.guidance_scale,
            options=loaded.options,
        )
        for wanted in speedup or (2.5, 3.0, 4.0):
            row = judge.planned(wanted)
            if row is None:
                print(f"{count:4d} steps {wanted:g}x: no schedule is so fast")
                continue
            decibels = judge.measure(row)
            mean = statistics.fmean(decibels)
            rows.append({
                "steps": count, "work_speedup": row.work_speedup, "predicted_db": row.predicted_db,
                "psnr_db": mean, "per_prompt_db": decibels, "std_db": statistics.pstdev(decibels),
                "schedule": row.schedule,
            })
            print(
                f"{count:4d} steps {row.work_speedup:.2f}x  predicted {row.predicted_db:.1f} dB, measured {mean:.1f} "
                f"(std over prompts {statistics.pstdev(decibels):.1f}, predicted "
                f"{known.compounding.prompt_std_db:.1f})", flush=True,
            )
    errors = [abs(row["predicted_db"] - row["psnr_db"]) for row in rows]
    mean_error = statistics.fmean(errors)
    print(f"mean absolute error {mean_error:.2f} dB over {len(rows)} schedules, worst {max(errors):.2f} dB")
    if output is not None:
        output.write_text(json.dumps({
            "schema": 1, "model": model, "device": device, "prompts": prompts, "gpus": gpus, "scheduler": scheduler,
            "rows": rows, "mean_abs_error_db": mean_error,
        }, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
