"""`hybridiff plan`: solve for the best split schedule."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..ir import Plan, Profile
    from ..planner import Fleet, FrontierPoint
    from .output import Output

__all__ = ["command"]

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def command(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile that `hybridiff profile` wrote.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many devices; with --objective, for all images together.")] = 2,
    min_psnr: Annotated[float | None, typer.Option(help="Fastest schedule of at least so many dB.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Best schedule that is so much faster than one device.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Best schedule whose loop takes no longer.")] = None,
    policy: Annotated[str | None, typer.Option(help="exact, or paper (the published adaptive rule).")] = None,
    quantile: Annotated[float | None, typer.Option(
        show_default="their mean must not", help="Share of prompts that may fall below --min-psnr, e.g. 0.05.")] = None,
    adaptive: Annotated[Path | None, typer.Option(
        metavar="SAMPLES", help="Pick a schedule per prompt; measured prompts from tools/measure_prompts.py.")] = None,
    steps: Annotated[int | None, typer.Option(min=3, show_default="the profile's", help="Denoising steps.")] = None,
    strength: Annotated[float, typer.Option(help="Of image-to-image: only the last part of the steps runs.")] = 1.0,
    costs: Annotated[str, typer.Option(help="measured, or work: denoiser evaluations, whatever the hardware.")] =
    "measured",
    without: Annotated[list[str] | None, typer.Option(
        help="A family of patterns not to use, e.g. reuse; repeat for more.")] = None,
    rank_speeds: Annotated[str | None, typer.Option(
        metavar="SPEEDS", help="Of every rank, relative to the profiled device, rank 0 first, e.g. 1,0.5.")] = None,
    rank_memory: Annotated[str | None, typer.Option(
        metavar="SIZES",
        help="What the denoiser's tensors may take on every rank, or one size for all, e.g. 24GiB,16GiB; leave room "
        "for the rest of the pipeline and the allocator.")] = None,
    weights: Annotated[str, typer.Option(
        help="stages: every rank holds the parameters of its stages only, for models that do not fit one.")] = "whole",
    pareto: Annotated[bool, typer.Option("--pareto", help="Print the whole frontier instead of one plan.")] = False,
    png: Annotated[Path | None, typer.Option(help="With --pareto: also plot it to this PNG file.")] = None,
    html: Annotated[Path | None, typer.Option(help="With --pareto: also write this HTML page.")] = None,
    objective: Annotated[str | None, typer.Option(
        help="throughput or latency: also choose how many GPUs one image gets, and how many images run at once.")]
    = None,
    arrival_rate: Annotated[float | None, typer.Option(help="Images per second that arrive at random.")] = None,
    percentile: Annotated[float, typer.Option(help="Of the response time that --arrival-rate is judged by.")] = 95.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The plan to write (JSON).")] = None,
    json_mode: Annotated[bool, typer.Option("--json", help="Print plan, frontier or fleet as one JSON object.")] =
    False,
) -> None:
    """Solve PROFILE for the best schedule under a quality or latency target."""
    from ..ir import Profile, UsageError
    from .files import check_writable
    from .output import opened

    target: dict[str, Any] = {
        "min_psnr": min_psnr, "speedup": speedup, "max_latency_ms": max_latency_ms, "policy": policy,
    }
    scope: dict[str, Any] = {
        "quantile": quantile, "num_inference_steps": steps, "strength": strength, "costs": costs,
        "without": without or (),
    }
    if pareto and (output is not None or any(value is not None for value in target.values())):
        raise UsageError("--pareto prints the whole frontier; give it without a target and without -o")
    if not pareto and (png is not None or html is not None):
        raise UsageError("--png and --html plot the frontier; give them together with --pareto")
    in_fleet = objective is not None or arrival_rate is not None
    if in_fleet + pareto + (adaptive is not None) > 1:
        raise UsageError("--pareto, --adaptive and --objective (or --arrival-rate) ask different things; give one")
    if weights != "whole" and (in_fleet or adaptive is not None):
        raise UsageError("--weights goes with a single plan or --pareto, not with --adaptive, --objective or "
                         "--arrival-rate")
    dividing: dict[str, Any] = {"weights": weights}
    ranks: dict[str, Any] = {"speeds": _speeds(rank_speeds), "memory_bytes": _sizes(rank_memory)}
    if (rank_speeds or rank_memory) and (pareto or in_fleet or adaptive is not None):
        raise UsageError("--rank-speeds and --rank-memory go with a single plan")
    for file in (output, png, html):
        check_writable(file)
    with opened(json_mode) as out:
        loaded = Profile.load(profile)
        if pareto:
            _pareto(out, loaded, gpus, scope | dividing, png, html)
        elif in_fleet:
            from ..planner import plan_fleet

            with out.progress() as on_progress:
                fleet = plan_fleet(
                    loaded, gpus=gpus, objective=objective or "latency", arrival_rate=arrival_rate,
                    percentile=percentile, on_progress=on_progress, **target, **scope,
                )
            _show(out, fleet.best.plan, output, fleet)
        elif adaptive is not None:
            from ..planner import PromptSamples, switched_plan

            solved = switched_plan(loaded, PromptSamples.load(adaptive), gpus=gpus, **target, **scope)
            _show(out, solved, output)
        else:
            from ..planner import plan as solve

            _show(out, solve(loaded, gpus=gpus, **target, **scope, **dividing, **ranks), output)


def _speeds(text: str | None) -> list[float] | None:
    from ..ir import UsageError

    try:
        return None if text is None else [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"got --rank-speeds {text!r}; give a number for every rank, e.g. 1,0.5") from None


def _sizes(text: str | None) -> list[int] | int | None:
    from ..ir import UsageError

    if text is None:
        return None
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB)?\s*", word)
        if match is None:
            raise UsageError(
                f"got --rank-memory {text!r}; give sizes such as 24GiB or 800MiB (or KiB, B), one for all ranks or one "
                "each"
            )
        sizes.append(int(float(match[1]) * _UNITS[match[2] or "B"]))
    return sizes[0] if len(sizes) == 1 else sizes


def _show(out: Output, solved: Plan, output: Path | None, fleet: Fleet | None = None) -> None:
    from ..report import describe_fleet, describe_plan

    written: list[RenderableType] = [] if output is None else [f"\nwrote {solved.save(output)}"]
    above = [] if fleet is None else describe_fleet(fleet)
    out.result(
        *above, *describe_plan(solved), *written,
        machine=lambda: solved.model_dump(mode="json") if fleet is None else _fleet(fleet),
    )


def _pareto(
    out: Output, loaded: Profile, gpus: int, scope: dict[str, Any], png: Path | None, html: Path | None
) -> None:
    from ..planner import frontier
    from ..report import describe_frontier

    in_work = scope["costs"] == "work"
    points = frontier(loaded, gpus=gpus, **scope)
    written: list[RenderableType] = []
    if png is not None or html is not None:
        from ..report.figures import frontier_figure, save_html, save_png

        title = f"{loaded.model.name} on {gpus} rank{'s' * (gpus > 1)}, {len(points[0].steps)} steps"
        figure = frontier_figure(
            points, title=title, unit="evaluations" if in_work else "s", quantile=scope["quantile"]
        )
        if png is not None:
            written.append(f"wrote {save_png([figure], png)}")
        if html is not None:
            written.append(f"wrote {save_html([figure], html, title=title)}")
    out.result(
        *describe_frontier(points, in_work=in_work), *written,
        machine=lambda: {"schema": 1, "frontier": [_point(p) for p in points]},
    )


def _point(point: FrontierPoint) -> dict[str, Any]:
    from ..ir import format_steps

    return {
        "speedup": point.speedup, "ideal_speedup": point.ideal_speedup, "work_speedup": point.work_speedup,
        "latency_s": point.latency_s, "psnr_db": point.psnr_db, "psnr_quantile_db": point.psnr_quantile_db,
        "schedule": format_steps(point.steps),
    }


def _fleet(fleet: Fleet) -> dict[str, Any]:
    return {
        "schema": 1, "gpus": fleet.gpus, "objective": fleet.objective, "arrival_rate": fleet.arrival_rate,
        "percentile": fleet.percentile, "best": fleet.options.index(fleet.best),
        "options": [
            {
                "gpus_per_image": option.gpus_per_image, "images_at_once": option.images_at_once,
                "latency_s": option.latency_s, "images_per_s": option.images_per_s, "utilisation": option.utilisation,
                "response_s": option.response_s, "plan": option.plan.model_dump(mode="json"),
            }
            for option in fleet.options
        ],
    }
