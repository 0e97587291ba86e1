"""What the planner found besides the plan itself: frontiers, fleets and explanations, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from .strip import legend, letters, strip
from .style import plain_table

if TYPE_CHECKING:
    from ..planner import Explanation, Fleet, FrontierPoint

__all__ = ["describe_explanation", "describe_fleet", "describe_frontier"]

_LISTED = 24
"""Points of the frontier that the table shows."""


def describe_frontier(points: Sequence[FrontierPoint], *, in_work: bool = False) -> list[RenderableType]:
    """A frontier as a table of evenly chosen points."""
    alphabet = letters(name for point in points for name in point.steps)
    robust = any(point.psnr_quantile_db is not None for point in points)
    headings = ["predicted", "ideal", "work", "evaluations" if in_work else "latency s", "PSNR dB"]
    table = plain_table(
        f"Pareto frontier: {len(points)} schedules", *headings, *(["quantile dB"] if robust else []), left=0
    )
    table.add_column("schedule (one letter per step)", overflow="fold")
    shown = sorted({round(i * (len(points) - 1) / (_LISTED - 1)) for i in range(_LISTED)}) if points else []
    for point in (points[index] for index in shown):
        lowest = "exact" if point.psnr_quantile_db is None else f"{point.psnr_quantile_db:.1f}"
        table.add_row(
            f"{point.speedup:.2f}x", f"{point.ideal_speedup:.2f}x",
            "-" if point.work_speedup is None else f"{point.work_speedup:.2f}x", f"{point.latency_s:.3f}",
            "exact" if point.psnr_db is None else f"{point.psnr_db:.1f}", *([lowest] if robust else []),
            strip(point.steps, alphabet),
        )
    return [table, legend(alphabet)]


def describe_fleet(fleet: Fleet) -> list[RenderableType]:
    """The ways to divide the GPUs, the best one marked."""
    arriving = fleet.arrival_rate is not None
    more = ["load", f"{fleet.percentile:g} % of images within s"] if arriving else []
    rate = f", {fleet.arrival_rate:g} images/s arriving at random" if arriving else ""
    table = plain_table(
        f"{fleet.gpus} GPUs, best {fleet.objective}{rate} (denoising loops alone)", "", "GPUs per image",
        "images at once", "loop s", "speed-up", "PSNR dB", "images/s", *more,
    )
    for option in fleet.options:
        predicted = option.plan.predictions
        queue = [
            "-" if option.utilisation is None else f"{option.utilisation:.0%}",
            "grows" if option.response_s is None else f"{option.response_s:.3f}",
        ]
        table.add_row(
            "*" if option is fleet.best else "", str(option.gpus_per_image), str(option.images_at_once),
            f"{option.latency_s:.3f}", "-" if predicted.speedup is None else f"{predicted.speedup:.2f}x",
            "exact" if predicted.psnr_db is None else f"{predicted.psnr_db:.1f}", f"{option.images_per_s:.3f}",
            *(queue if arriving else []),
        )
    return [table]


def describe_explanation(found: Explanation) -> list[RenderableType]:
    """What the cheap steps buy and cost, what binds, what a little more would buy."""
    table = plain_table(
        "\nwhat the cheap steps buy and cost", "steps", "patterns", "saves ms", "costs dB", "share of error", left=2
    )
    for run in found.runs:
        table.add_row(
            f"{run.start}-{run.stop - 1}", " ".join(f"{count} {name}" for name, count in run.patterns.items()),
            f"{run.saved_ms:.2f}", "all" if run.cost_db is None else f"{run.cost_db:.2f}", f"{run.error_share:.1%}",
        )
    quality = "exact" if found.psnr_db is None else f"{found.psnr_db:.2f} dB"
    lines: list[RenderableType] = [table] if found.runs else []
    lines.append(Text(f"\npredicted {found.latency_ms:.2f} ms, {quality}; what binds is {found.binding}"))
    for trade in found.trades:
        gain = "exact" if trade.delta_db is None else f"{trade.delta_db:+.2f} dB"
        lines.append(Text(f"{trade.what:>11}: {trade.delta_ms:+.2f} ms, {gain}"))
    return lines
