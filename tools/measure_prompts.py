"""Measure prompts for adaptive plans: discrepancy curves and the PSNR of planned schedules, prompt by prompt.

    python tools/measure_prompts.py profiles/cpu/unet.json bundled:unet -o samples.json
    hybridiff plan profiles/cpu/unet.json --min-psnr 30 --quantile 0.05 --adaptive samples.json -o plan.json

Printed is how much of the difference between prompts the discrepancy of the first steps explains, which is what an
adaptive plan can gain from.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer


def main(
    profile: Annotated[Path, typer.Argument(help="A profile with pattern errors.")],
    model: Annotated[str, typer.Argument(help="The model that it is about, e.g. bundled:unet.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")],
    speedup: Annotated[list[float] | None, typer.Option(help="In denoiser evaluations; repeat for more.")] = None,
    gpus: Annotated[int, typer.Option(min=1)] = 2,
    held_out: Annotated[bool, typer.Option("--held-out", help="The held-out prompts, to check a plan with.")] = False,
    prompts: Annotated[int, typer.Option(min=1)] = 24,
    batch: Annotated[int, typer.Option(min=1, help="Prompts simulated together.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure and save the samples."""
    import torch

    from hybridiff_compiler.cli.models import load_model
    from hybridiff_compiler.ir import Profile
    from hybridiff_compiler.planner.switching import MEASURED, best_statistic
    from hybridiff_compiler.quality.equal_cost import Judge
    from hybridiff_compiler.quality.prompt_samples import measure_prompts

    torch.backends.cudnn.allow_tf32 = False  # rounding would hide in the PSNR of nearly exact schedules
    known = Profile.load(profile)
    loaded = load_model(model, device=device, dtype=known.model.dtype)
    chosen = loaded.held_out_prompts if held_out else loaded.profiling_prompts
    judge = Judge(
        loaded.pipe, known, gpus=gpus, prompts=chosen[:prompts], batch=batch, options=loaded.options,
        seed=0 if not held_out else 1000,
    )
    samples = measure_prompts(judge, speedup or (3.0, 4.0, 5.0))
    samples.save(output)
    for schedule, row in zip(samples.schedules, samples.psnr_db):
        low = sorted(row)[max(0, round(0.05 * len(row)) - 1)]
        mean, spread = statistics.fmean(row), statistics.pstdev(row)
        print(f"mean {mean:.2f} dB, std {spread:.2f}, lowest 5 % {low:.2f}: {schedule}")
    for measured in MEASURED:
        statistic, _, line = best_statistic(samples, measured)
        print(
            f"{statistic} of {measured} steps explains {line.explained:.0%} of the offsets' variance; the rest has a "
            f"standard deviation of {line.std_db:.2f} dB"
        )


if __name__ == "__main__":
    typer.run(main)
