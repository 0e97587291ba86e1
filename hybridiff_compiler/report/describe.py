"""Profiles and plans in words, tables and text plots: what `hybridiff show` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..ir import Certificate, Pattern, Plan, Predictions, Profile
from .describe_costs import describe_links, describe_timing, source_line
from .describe_errors import describe_guidance, describe_redundancy, describe_trust
from .strip import count_patterns, legend, letters, representative_steps, strip
from .style import FittedText, plain_table
from .timeline import TIMELINE_LEGEND, timeline

__all__ = ["describe_plan", "describe_profile", "plan_summary"]

_MAX_ROWS = 60
"""Layers listed one by one."""


def describe_plan(plan: Plan) -> list[RenderableType]:
    """Everything about a plan, for printing."""
    alphabet = letters(pattern.name for pattern in plan.patterns)
    parts: list[RenderableType] = [
        _heading(f"plan for {plan.model.name} ({plan.model.denoiser}, {plan.model.dtype}) on {plan.world_size} x "
                 f"{plan.ranks[0].device}, {plan.num_steps} steps"),
        *plan_summary(plan),
        _patterns_table(plan.patterns, alphabet=alphabet, counts=count_patterns(representative_steps(plan.schedule))),
    ]
    if plan.partitions:
        parts.append(_partitions_table(plan))
    parts += [_heading("timeline"), FittedText(lambda width: timeline(plan, width=width)), Text(TIMELINE_LEGEND)]
    if plan.provenance is not None:
        versions = ", ".join(f"{name} {version}" for name, version in plan.provenance.versions.items())
        parts.append(Text(
            f"made {plan.provenance.created} from profile {plan.provenance.profile_sha256[:12]} with {versions}"
        ))
    return parts


def plan_summary(plan: Plan) -> list[RenderableType]:
    """Schedule and predictions of a plan in a few lines."""
    alphabet = letters(pattern.name for pattern in plan.patterns)
    steps = representative_steps(plan.schedule)
    return [
        Text(f"schedule: {plan.schedule}"),
        Text(f"          {strip(steps, alphabet)}"),
        Text(f"          {legend({name: alphabet[name] for name in dict.fromkeys(steps)})}"),
        Text(f"predicted: {_predictions(plan.predictions)}"),
        *([] if not plan.predictions.peak_bytes else [Text(f"memory:    {_peaks(plan.predictions.peak_bytes)}")]),
        *([] if plan.certificate is None else [Text(f"proven:    {_certificate(plan.certificate)}")]),
        *([] if not plan.idle_ranks else [Text(f"idle:      {_idle(plan.idle_ranks)}")]),
    ]


def describe_profile(profile: Profile) -> list[RenderableType]:
    """Everything about a profile, for printing."""
    source = profile.provenance
    parts: list[RenderableType] = [
        _heading(f"profile of {profile.model.name} ({profile.model.denoiser}, {profile.model.dtype}, "
                 f"{profile.model.parameter_bytes / 2**20:.1f} MiB)"),
        Text(f"{profile.num_steps} steps{f' of {profile.scheduler}' * bool(profile.scheduler)}, "
             f"guidance {profile.guidance_scale:g}, {source.prompts} prompts, seed {source.seed}"),
        Text(source_line(source)),
        Text("inputs of one branch: " + "; ".join(map(str, profile.model.signature.leaves))),
    ]
    if source.random_weights:
        parts.append(Text("random weights: only the times mean anything", style="bold"))
    parts.append(_layers_table(profile))
    if profile.costs.stages:
        parts.append(_stages_table(profile))
    parts += [*describe_timing(profile), *describe_links(profile), *describe_guidance(profile)]
    if profile.patterns:
        parts.append(_patterns_table(profile.patterns))
    if profile.errors:
        parts.append(_errors_table(profile))
        parts += describe_redundancy(profile)
        parts += describe_trust(profile)
    return parts


def _predictions(predictions: Predictions) -> str:
    words = []
    if predictions.speedup is not None:
        words.append(f"{predictions.speedup:.2f}x over one rank")
    if predictions.ideal_speedup is not None:
        words.append(f"{predictions.ideal_speedup:.2f}x ideal")
    if predictions.work_speedup is not None:
        words.append(f"{predictions.work_speedup:.2f}x in denoiser evaluations")
    if predictions.latency_s is not None:
        words.append(f"{predictions.latency_s:.3f} s for the denoising loop")
    if predictions.psnr_db is not None:
        words.append(f"{predictions.psnr_db:.1f} dB")
    if predictions.psnr_quantile_db is not None and predictions.quantile is not None:
        words.append(f"{predictions.psnr_quantile_db:.1f} dB or more for {1 - predictions.quantile:.0%} of prompts")
    return ", ".join(words) + (f"   (asked for {predictions.target})" if predictions.target else "") or "nothing"


def _peaks(peaks: Sequence[int]) -> str:
    each = ", ".join(f"{peak / 2**30:.3g}" for peak in peaks)
    return (
        f"about {each} GiB on the ranks for the tensors of the denoiser; the rest of the pipeline, libraries and what "
        "the allocator leaves unused come on top"
    )


def _idle(ranks: Sequence[int]) -> str:
    return (
        f"no step computes anything on rank {', '.join(map(str, ranks))}: fewer GPUs do as well, or --objective "
        "throughput makes several images side by side"
    )


def _certificate(proof: Certificate) -> str:
    what = "latency" if proof.objective == "latency_s" else "error"
    merged = ", ages merged in the search" if proof.simplified else ""
    gap = "optimal" if proof.gap < 1e-6 else f"{what} within {proof.gap:.2%} of the least possible"
    scope = {
        "all": "all schedules of the candidate patterns", "undominated": "all schedules of the undominated patterns",
        "relaxed": "all schedules of the candidate patterns, by a loose bound",
    }[proof.over]
    return f"{gap} over {scope} ({proof.states} states, {proof.labels} labels{merged})"


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _patterns_table(
    patterns: Iterable[Pattern], *, alphabet: dict[str, str] | None = None, counts: dict[str, int] | None = None
) -> Table:
    columns = [*([] if alphabet is None else ["", "steps"]), "pattern", "partition", "table"]
    table = plain_table("\npatterns (unit = branch and stage @ rank, ~ stale)", *columns, left=len(columns))
    for pattern in patterns:
        first = [] if alphabet is None else [alphabet[pattern.name], str((counts or {}).get(pattern.name, 0))]
        table.add_row(*first, pattern.name, pattern.partition, Text(pattern.table))
    return table


def _partitions_table(plan: Plan) -> Table:
    table = plain_table("\npartitions", "partition", "stage", "layers", "from", "to")
    for partition in plan.partitions:
        for index, stage in enumerate(partition.stages):
            table.add_row(partition.name, str(index), str(len(stage)), stage[0], stage[-1])
    return table


def _layers_table(profile: Profile) -> Table:
    batches = sorted(profile.costs.layers)
    table = plain_table("\nlayers", "layer", "kind", "parameters", *[f"ms at batch {batch}" for batch in batches])
    for index, layer in enumerate(profile.graph.layers[:_MAX_ROWS]):
        times = [f"{1e3 * profile.costs.layers[batch][index]:.3f}" for batch in batches]
        table.add_row(layer.name, layer.kind, f"{layer.parameter_bytes / 2**10:.0f} KiB", *times)
    hidden = len(profile.graph.layers) - _MAX_ROWS
    if hidden > 0:
        table.add_row(f"... and {hidden} more", "", "", *[""] * len(batches))
    totals = [f"{1e3 * sum(profile.costs.layers[batch]):.3f}" for batch in batches]
    table.add_section()
    table.add_row(f"{len(profile.graph.layers)} layers", "", "", *totals)
    return table


def _stages_table(profile: Profile) -> Table:
    table = plain_table("\nstage graphs", "partition", "stages", "batch", "ms", "spread")
    for cost in profile.costs.stages:
        table.add_row(
            cost.partition, ",".join(map(str, cost.stages)), str(cost.batch), f"{1e3 * cost.seconds:.3f}",
            f"{cost.spread:.0%}",
        )
    return table


def _errors_table(profile: Profile) -> Table:
    steps = sorted({round(position * (profile.num_steps - 1) / 8) for position in range(9)})
    heading = "\nimage error (RMSE) of one step run so, by step"
    table = plain_table(heading, "pattern", "source", "age", *map(str, steps), left=2)
    for errors in profile.errors:
        for curve in errors.curves:
            for age in sorted({1, curve.max_age}):
                cells = [f"{curve.rmse[step][age - 1]:.1e}" for step in steps]
                source = curve.source if curve.gap is None else f"{curve.source}, gap {curve.gap}"
                table.add_row(errors.pattern, source, str(age), *cells)
    return table
