"""`hybridiff plan`: solve for the best split schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..planner import FrontierPoint

__all__ = ["command"]

_LISTED = 24
"""Points of the frontier that the table shows; `--json` has them all."""


def command(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile that `hybridiff profile` wrote.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many devices.")] = 2,
    min_psnr: Annotated[float | None, typer.Option(help="Fastest schedule of at least so many dB.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Best schedule that is so much faster than one device.")] = None,
    policy: Annotated[str | None, typer.Option(help="exact, or paper (the published adaptive rule).")] = None,
    without: Annotated[list[str] | None, typer.Option(help="A family of patterns not to use, e.g. reuse.")] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Print the whole frontier instead of one plan.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The plan to write (JSON).")] = None,
    json_mode: Annotated[bool, typer.Option("--json", help="Print plan or frontier as one JSON object.")] = False,
) -> None:
    """Solve PROFILE for the best schedule under a quality or latency target."""
    from ..ir import Profile, UsageError
    from ..planner import frontier
    from ..planner import plan as solve
    from ..report import describe_plan
    from .files import check_writable
    from .output import opened

    if pareto and (output is not None or (min_psnr, speedup, policy) != (None, None, None)):
        raise UsageError("--pareto prints the whole frontier; give it without a target and without -o")
    check_writable(output)
    with opened(json_mode) as out:
        loaded = Profile.load(profile)
        if pareto:
            points = frontier(loaded, gpus=gpus, without=without or ())
            out.result(*_frontier_table(points), machine=lambda: {"schema": 1, "frontier": [_point(p) for p in points]})
            return
        solved = solve(
            loaded, gpus=gpus, min_psnr=min_psnr, speedup=speedup, policy=policy, without=without or (),
        )
        written: list[RenderableType] = [] if output is None else [f"\nwrote {solved.save(output)}"]
        out.result(*describe_plan(solved), *written, machine=lambda: solved.model_dump(mode="json"))


def _point(point: FrontierPoint) -> dict[str, Any]:
    from ..ir import format_steps

    return {
        "speedup": point.speedup, "ideal_speedup": point.ideal_speedup, "latency_s": point.latency_s,
        "psnr_db": point.psnr_db, "schedule": format_steps(point.steps),
    }


def _frontier_table(points: Sequence[FrontierPoint]) -> list[RenderableType]:
    from ..report import legend, letters, plain_table, strip

    alphabet = letters(name for point in points for name in point.steps)
    title = f"Pareto frontier: {len(points)} schedules"
    table = plain_table(title, "predicted", "ideal", "latency s", "PSNR dB", left=0)
    table.add_column("schedule (one letter per step)", overflow="fold")
    shown = sorted({round(i * (len(points) - 1) / (_LISTED - 1)) for i in range(_LISTED)}) if points else []
    for point in (points[index] for index in shown):
        table.add_row(
            f"{point.speedup:.2f}x", f"{point.ideal_speedup:.2f}x", f"{point.latency_s:.3f}",
            "exact" if point.psnr_db is None else f"{point.psnr_db:.1f}", strip(point.steps, alphabet),
        )
    return [table, legend(alphabet)]
