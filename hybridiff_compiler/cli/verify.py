"""`hybridiff verify`: what a plan gains and costs here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..quality.verify import Verification

__all__ = ["command"]


def command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan, or a bundle that `hybridiff compile` wrote.")],
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="bundled:unet, bundled:mmdit, a local diffusers folder, or a hub id.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to judge by; repeat for more.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one a line.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use only the first so many prompts.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; must be the plan's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(
        show_default="5", help="Classifier-free guidance scale.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Image height in pixels; must be the plan's.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Image width in pixels; must be the plan's.")] = None,
    seed: Annotated[int, typer.Option(help="Prompt k starts from seed + k.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads per rank, on both sides.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Least number of timed generations per side.")] = 3,
    simulate: Annotated[bool, typer.Option("--simulate", help="One process plays all ranks; no times.")] = False,
    min_psnr: Annotated[float | None, typer.Option(help="Fail (exit code 1) when the mean PSNR is below this.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The report to write (JSON).")] = None,
    json_mode: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare PLAN with the exact run of MODEL on one device: PSNR, SSIM, largest difference, latency."""
    from ..ir import Plan, write_text_atomically
    from .calls import call_options, check_finite
    from .files import check_writable
    from .models import load_for_plan
    from .output import opened
    from .prompts import choose_prompts

    check_finite(guidance_scale=guidance_scale, min_psnr=min_psnr)
    check_writable(output)
    with opened(json_mode) as out:
        if plan.is_dir():
            from ..bundle import Bundle

            bundle = Bundle.open(plan)
            loaded_plan = bundle.plan
        else:
            bundle, loaded_plan = None, Plan.load(plan)
        loaded = load_for_plan(model, loaded_plan)
        chosen = choose_prompts(prompt, prompts, default=loaded.held_out_prompts, limit=limit)
        from ..quality.verify import check_verification
        from ..quality.verify import verify as compare

        with out.progress() as on_progress:
            report = compare(
                loaded.pipe, bundle or loaded_plan, prompts=chosen, num_inference_steps=steps,
                guidance_scale=loaded.guidance_scale if guidance_scale is None else guidance_scale, seed=seed,
                simulated=simulate, threads=threads, repeats=repeats, on_progress=on_progress,
                **call_options(loaded, height, width),
            )
        if output is not None:
            write_text_atomically(output, report.model_dump_json(indent=1) + "\n")
        out.result(*_describe(report), machine=lambda: report.model_dump(mode="json"))
        check_verification(report, min_psnr=min_psnr)


def _describe(report: Verification) -> list[RenderableType]:
    from ..report import plain_table

    table = plain_table(f"{report.model}: {report.schedule}", "prompt", "PSNR dB", "SSIM", "max diff")
    for item in report.prompts:
        quality = "-" if item.psnr_db is None else f"{item.psnr_db:.1f}"
        table.add_row(item.prompt, quality, f"{item.ssim:.4f}", f"{item.max_abs_diff:.1e}")
    mean = "exact" if report.psnr_db is None else f"{report.psnr_db:.1f}"
    table.add_section()
    table.add_row("mean (largest difference)", mean, f"{report.ssim:.4f}", f"{report.max_abs_diff:.1e}")
    lines: list[RenderableType] = [table]
    if report.predicted_psnr_db is not None:
        lines.append(f"predicted PSNR {report.predicted_psnr_db:.1f} dB")
    if report.psnr_quantile_db is not None and report.predicted_psnr_quantile_db is not None:
        lines.append(f"lowest prompts (the plan's quantile) {report.psnr_quantile_db:.1f} dB, predicted "
                     f"{report.predicted_psnr_quantile_db:.1f} dB")
    if report.simulator_max_abs_diff is not None:
        lines.append(f"largest difference between ranks and simulator: {report.simulator_max_abs_diff:.1e}")
    if report.split_batch_max_abs_diff is not None:
        lines.append(f"largest difference from the split-batch reference: {report.split_batch_max_abs_diff:.1e}")
    threads = "" if report.threads is None else f", {report.threads} thread(s) per rank"
    lines.append(f"denoising loop on one rank {report.single_latency_s:.3f} s, whole call {report.single_call_s:.3f} s"
                 + threads)
    if report.latency_s is not None and report.speedup is not None:
        predicted = "" if report.predicted_speedup is None else f" (predicted {report.predicted_speedup:.2f}x)"
        lines.append(f"denoising loop on {report.ranks} rank(s) {report.latency_s:.3f} s, whole call "
                     f"{report.call_s:.3f} s: {report.speedup:.2f}x{predicted}")
    return lines
