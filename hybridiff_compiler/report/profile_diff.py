"""Two profiles side by side: what costs, links, guidance and errors changed by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from ..ir import WHOLE, Profile
from .describe_costs import source_line
from .style import plain_table

__all__ = ["Change", "ProfileDiff", "Repeated", "describe_diff", "diff_profiles"]

_MOST_ROWS = 20
"""Layers listed one by one: those whose time changed most."""


@dataclass(frozen=True)
class Change:
    """One figure in both profiles; None where a profile does not have it."""

    name: str
    first: float | None
    second: float | None

    @property
    def relative(self) -> float | None:
        """Change from the first to the second, relative to the first."""
        if self.first is None or self.second is None or self.first == 0:
            return None
        return self.second / self.first - 1


@dataclass(frozen=True)
class Repeated:
    """Two measurements of the same thing: how much lies within the spread that the profiles state.

    The stated spread is the inter-quartile range of single samples; medians differ by less than the larger of the two
    ranges unless the machine was another one, so to say.
    """

    layers_within: float
    """Share of the layers, by their time, whose change is within the larger stated spread."""
    stages_within: int
    stages: int
    """Stage graphs that do, of those that both have."""


@dataclass(frozen=True)
class ProfileDiff:
    """Everything that two profiles can be compared by; figures in seconds, bytes per second, or as named."""

    first: str
    second: str
    same_denoiser: bool
    about: tuple[tuple[str, str, str], ...]
    """What differs in words: (what, first, second)."""
    totals: tuple[Change, ...]
    layers: tuple[Change, ...]
    """Seconds by layer name, of the smallest batch that both have."""
    stages: tuple[Change, ...]
    links: tuple[Change, ...]
    guidance: tuple[Change, ...]
    """rel-MAE by step, mean over prompts."""
    errors: tuple[Change, ...]
    """Mean over steps of the RMSE, by pattern, source and age."""
    repeated: Repeated | None = None
    """Whether the second profile confirms the first, where both are of the same denoiser on the same device."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, every change with its relative size."""
        def rows(changes: Iterable[Change]) -> list[dict[str, Any]]:
            return [{**asdict(change), "relative": change.relative} for change in changes]

        tables = ("totals", "layers", "stages", "links", "guidance", "errors")
        return {
            "schema": 1, "first": self.first, "second": self.second, "same_denoiser": self.same_denoiser,
            "about": [{"what": what, "first": a, "second": b} for what, a, b in self.about],
            **{name: rows(getattr(self, name)) for name in tables},
            "repeated": None if self.repeated is None else asdict(self.repeated),
        }


def diff_profiles(first: Profile, second: Profile, names: tuple[str, str] = ("first", "second")) -> ProfileDiff:
    """Compare two profiles; they may be of different denoisers, then layers of equal name are compared."""
    batches = sorted(first.costs.layers.keys() & second.costs.layers.keys())
    batch = batches[0] if batches else None
    return ProfileDiff(
        first=names[0], second=names[1], same_denoiser=first.model.fingerprint == second.model.fingerprint,
        about=tuple(_about(first, second)),
        totals=(
            *(Change(f"all layers, batch {b}", sum(first.costs.layers[b]), sum(second.costs.layers[b]))
              for b in batches),
            Change("step overhead", first.costs.step_overhead_s, second.costs.step_overhead_s),
        ),
        layers=_both(_layers(first, batch), _layers(second, batch)),
        stages=_both(_stages(first), _stages(second)),
        links=_both(_links(first), _links(second)),
        guidance=_both(_guidance(first), _guidance(second)),
        errors=_both(_errors(first), _errors(second)), repeated=_repeated(first, second, batch),
    )


def describe_diff(diff: ProfileDiff) -> list[RenderableType]:
    """A comparison for printing."""
    parts: list[RenderableType] = [Text(f"{diff.first}  ->  {diff.second}", style="bold")]
    if not diff.same_denoiser:
        parts.append(Text("different denoisers: layers of equal name are compared", style="bold"))
    parts += [Text(f"{what}:\n  {a}\n  {b}") for what, a, b in diff.about]
    if diff.repeated is not None:
        again = diff.repeated
        parts.append(Text(
            f"same denoiser and device: within the stated spread are layers with {again.layers_within:.0%} of the time "
            f"and {again.stages_within} of {again.stages} stage graphs"
        ))
    parts.append(_table("totals", "ms", diff.totals, 1e3))
    moved = sorted(
        diff.layers, key=lambda change: -abs((change.second or 0.0) - (change.first or 0.0))
    )[:_MOST_ROWS]
    some = f", the {_MOST_ROWS} of {len(diff.layers)} that changed most" if len(moved) < len(diff.layers) else ""
    parts.append(_table(f"layers{some}", "ms", moved, 1e3))
    for title, unit, changes, scale in (
        ("stage graphs", "ms", diff.stages, 1e3), ("links", "", diff.links, 1.0),
        ("discrepancy (rel-MAE) by step", "", _thinned(diff.guidance), 1.0),
        ("image error (RMSE), mean over steps", "", diff.errors, 1.0),
    ):
        if changes:
            parts.append(_table(title, unit, changes, scale))
    return parts


def _table(title: str, unit: str, changes: Iterable[Change], scale: float) -> RenderableType:
    table = plain_table(f"\n{title}{f' ({unit})' if unit else ''}", "", "first", "second", "change")
    for change in changes:
        relative = change.relative
        table.add_row(
            change.name, _form(change.first, scale), _form(change.second, scale),
            "-" if relative is None else f"{relative:+.1%}",
        )
    return table


def _form(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.4g}"


def _thinned(changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """At most about ten, evenly."""
    return changes[:: max(1, math.ceil(len(changes) / 10))]


def _about(first: Profile, second: Profile) -> Iterator[tuple[str, str, str]]:
    pairs = {
        "model": (first.model.name, second.model.name),
        "denoiser": (f"{first.model.denoiser}, {first.model.dtype}", f"{second.model.denoiser}, {second.model.dtype}"),
        "layer graph": (first.model.fingerprint[:12], second.model.fingerprint[:12]),
        "times": (source_line(first.provenance), source_line(second.provenance)),
        "generation": tuple(
            f"{p.num_steps} steps of {p.scheduler or 'any scheduler'}, guidance {p.guidance_scale:g}"
            for p in (first, second)
        ),
        "versions": tuple(
            ", ".join(f"{k} {v}" for k, v in sorted(p.provenance.versions.items())) for p in (first, second)
        ),
        "partitions": tuple(
            ", ".join(f"{part.name} {'|'.join(str(len(s)) for s in part.stages)}" for part in p.partitions)
            for p in (first, second)
        ),
    }
    for what, (a, b) in pairs.items():
        if a != b:
            yield what, a, b


def _both(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[Change, ...]:
    return tuple(Change(name, first.get(name), second.get(name)) for name in dict.fromkeys((*first, *second)))


def _layers(profile: Profile, batch: int | None) -> dict[str, float]:
    return {} if batch is None else dict(zip(profile.graph.names, profile.costs.layers[batch]))


def _stages(profile: Profile) -> dict[str, float]:
    return {
        f"{cost.partition} {','.join(map(str, cost.stages))}, batch {cost.batch}": cost.seconds
        for cost in profile.costs.stages
    }


def _links(profile: Profile) -> dict[str, float]:
    found = {}
    for link in profile.costs.links:
        found[f"{link.source} -> {link.target}, us"] = 1e6 * link.latency_s
        found[f"{link.source} -> {link.target}, GB/s"] = link.bytes_per_s / 1e9
    for cast in profile.costs.broadcasts:
        found[f"{cast.root} -> all {cast.ranks}, us"] = 1e6 * cast.latency_s
        found[f"{cast.root} -> all {cast.ranks}, GB/s"] = cast.bytes_per_s / 1e9
    return found


def _guidance(profile: Profile) -> dict[str, float]:
    if profile.guidance is None:
        return {}
    return {f"step {step}": value for step, value in enumerate(profile.guidance.mean)}


def _errors(profile: Profile) -> dict[str, float]:
    found = {}
    for errors in profile.errors:
        for curve in errors.curves:
            for age in sorted({1, curve.max_age}):
                column = [row[age - 1] for row in curve.rmse]
                at = f"age {age}" if curve.gap is None else f"age {age}, gap {curve.gap}"
                found[f"{errors.pattern}, {curve.source}, {at}"] = sum(column) / len(column)
    return found


def _repeated(first: Profile, second: Profile, batch: int | None) -> Repeated | None:
    a, b = first.costs.timing, second.costs.timing
    if batch is None or a is None or b is None or batch not in a.spread or batch not in b.spread:
        return None
    if first.model.fingerprint != second.model.fingerprint or first.provenance.device != second.provenance.device:
        return None
    seconds = first.costs.layers[batch]
    rows = zip(seconds, second.costs.layers[batch], a.spread[batch], b.spread[batch])
    within = sum(one for one, other, left, right in rows if _within(one, other, left, right))
    known = {(cost.partition, cost.stages, cost.batch): cost for cost in second.costs.stages}
    same = {part.name for part in first.partitions if part in second.partitions} | {WHOLE}
    pairs = [
        (cost, known[key]) for cost in first.costs.stages
        if (key := (cost.partition, cost.stages, cost.batch)) in known and cost.partition in same
    ]
    return Repeated(
        layers_within=within / sum(seconds), stages=len(pairs),
        stages_within=sum(_within(one.seconds, other.seconds, one.spread, other.spread) for one, other in pairs),
    )


def _within(first: float, second: float, spread_first: float, spread_second: float) -> bool:
    return abs(second - first) <= max(spread_first * first, spread_second * second)
