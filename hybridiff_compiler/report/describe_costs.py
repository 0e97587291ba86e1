"""How a profile's times came about, and its links, in words and tables."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..ir import LayerTiming, Profile, Provenance
from .style import plain_table

__all__ = ["describe_links", "describe_timing", "source_line"]

_METHODS = {
    "wall": "host clock between layers inside the running whole",
    "graph": "device time between layers inside one CUDA graph of the whole",
    "compiled": "device time between layers inside one CUDA graph of the compiled whole",
    "eager-graph": "device time between layers of the uncompiled whole, as shares of the compiled one",
    "roofline": "estimated from arithmetic and bytes",
}


def source_line(source: Provenance) -> str:
    """Where, when and how measured or estimated."""
    threads = "" if source.threads is None else f", {source.threads} thread{'s' * (source.threads != 1)} per rank"
    known = source.clocks_mhz
    clocks = f", {known['sm']} of {known['sm_max']} MHz" if {"sm", "sm_max"} <= known.keys() else ""
    if source.estimated is not None:
        return f"ESTIMATED {source.created} for {source.device}: {source.estimated}"
    return f"measured {source.created} on {source.device}{clocks}, {source.backend}{threads}"


def describe_timing(profile: Profile) -> list[RenderableType]:
    """How layer times were measured and how far measured stages are from their layers; nothing for old profiles."""
    timing = profile.costs.timing
    if timing is None:
        return []
    lines = [f"layer times: {_METHODS[timing.method]}"]
    if timing.raw_sum:
        sums = ", ".join(f"{ratio:.1%} at batch {batch}" for batch, ratio in sorted(timing.raw_sum.items()))
        lines.append(f"sum of layers before scaling, of the whole: {sums}")
    if timing.spread:
        lines.append("spread over repeats, weighted by time: " + ", ".join(
            f"{_mean_spread(profile, timing, batch):.1%} at batch {batch}" for batch in sorted(timing.spread)
        ))
    if timing.stage_residual is not None:
        settled = "settled" if timing.settled else "still moving"
        lines.append(
            f"stages off the sum of their layers by up to {timing.stage_residual:.1%}, after fitting the layers "
            f"{timing.fitted_residual or 0.0:.1%}; partitions {settled} after {timing.rounds} rounds"
        )
    if timing.missing:
        lines.append(f"INCOMPLETE, the time was over before these were measured: {', '.join(timing.missing)}")
    return [Text(line) for line in lines]


def describe_links(profile: Profile) -> list[RenderableType]:
    """The links as a table; nothing when none were measured."""
    costs = profile.costs
    if not costs.links and not costs.broadcasts:
        return []
    table: Table = plain_table(
        f"\nlinks{f' over {costs.transport}' if costs.transport else ''}", "ranks", "latency us", "GB/s", "spread",
        "off the line", "1 MiB us",
    )
    for link in costs.links:
        table.add_row(f"{link.source} -> {link.target}", *_numbers(link.latency_s, link.bytes_per_s, link.spread,
                                                                   link.residual))
    for cast in costs.broadcasts:
        table.add_row(f"{cast.root} -> all {cast.ranks}", *_numbers(cast.latency_s, cast.bytes_per_s, cast.spread,
                                                                    cast.residual))
    return [table]


def _numbers(latency_s: float, bytes_per_s: float, spread: float, residual: float) -> list[str]:
    return [
        f"{1e6 * latency_s:.1f}", f"{bytes_per_s / 1e9:.2f}", f"{spread:.0%}", f"{residual:.0%}",
        f"{1e6 * (latency_s + 2**20 / bytes_per_s):.1f}",
    ]


def _mean_spread(profile: Profile, timing: LayerTiming, batch: int) -> float:
    seconds = profile.costs.layers[batch]
    return sum(s * t for s, t in zip(timing.spread[batch], seconds)) / sum(seconds)
