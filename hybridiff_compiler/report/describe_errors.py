"""The error side of a profile as tables and text plots: guidance, redundancy, how far predictions can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, pstdev

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..ir import Guidance, Partition, Profile
from ..planner import candidate_partitions
from ..planner.policy import paper_schedule
from ..planner.staleness import lost_bytes, rank_errors, stale_tables
from .style import FittedText, plain_table
from .textplot import text_plot

__all__ = ["describe_guidance", "describe_redundancy", "describe_trust"]

_MAX_VALUES = 12
"""Values of the redundancy table."""


def describe_guidance(profile: Profile) -> list[RenderableType]:
    """Discrepancy curves over prompts, their curvature, and where the published rule would switch."""
    if profile.guidance is None:
        return []
    curve = profile.guidance.mean
    parts: list[RenderableType] = [
        Text("\ndenoising discrepancy (rel-MAE), mean over prompts", style="bold"),
        FittedText(lambda width: text_plot(curve, width=width)),
    ]
    steps = _shown(profile.num_steps)
    table = plain_table("\nrel-MAE over prompts, by step", "guidance", "of prompts", *map(str, steps), left=2)
    for each in (profile.guidance, *profile.further_guidance):
        scale = profile.guidance_scale if each.scale is None else each.scale
        rows = {
            "mean": each.mean, "10 %": each.quantile(0.1), "50 %": each.quantile(0.5), "90 %": each.quantile(0.9),
            "curvature": each.curvature,
        }
        for name, row in rows.items():
            cells = [f"{row[step]:+.1e}" if name == "curvature" else f"{row[step]:.4f}" for step in steps]
            table.add_row(f"{scale:g}", name, *cells)
    parts.append(table)
    parts += [Text(_switching(profile, each)) for each in (profile.guidance, *profile.further_guidance)]
    return parts


def describe_redundancy(profile: Profile) -> list[RenderableType]:
    """How much what partitions cut changes from step to step."""
    redundancy = profile.redundancy
    if redundancy is None or not redundancy.change:
        return []
    change = redundancy.mean
    table = plain_table("", "partition", "slowest stage", "values", "KiB", "change", "stale KiB x change", left=1)
    layer_s = dict(zip(profile.graph.names, profile.costs.layers[min(profile.costs.layers)]))
    for partition in (*profile.partitions, *_by_bytes(profile)):
        stages = range(len(partition.stages))
        cut = {v.name: v for a in stages for b in stages if a != b for v in partition.cut(profile.graph, a, b)}
        size = sum(value.nbytes for value in cut.values())
        spread = lost_bytes(cut.values(), change)
        read = {v.name: v for stage in stages[:-1] for v in partition.received(profile.graph, stage, stages[-1:])}
        lost = lost_bytes(read.values(), change)
        if size and spread is not None and lost is not None:
            slowest = max(sum(layer_s[name] for name in stage) for stage in partition.stages) / sum(layer_s.values())
            table.add_row(
                partition.name, f"{slowest:.1%}", str(len(cut)), f"{size / 2**10:.0f}", f"{spread / size:.3f}",
                f"{lost / 2**10:.2f}",
            )
    steps = [step for step in _shown(profile.num_steps) if step > 0]
    names = sorted(change, key=lambda name: change[name])
    picked = names if len(names) <= _MAX_VALUES else names[: _MAX_VALUES // 2] + names[-_MAX_VALUES // 2 :]
    producers = {value.name: value.producer for value in profile.graph.values}
    values = plain_table(
        f"\nof single values, by step (the {len(picked)} steadiest and most restless of {len(names)})"
        if len(picked) < len(names) else "\nof single values, by step",
        "value", "from layer", "mean", *map(str, steps), left=2,
    )
    for name in picked:
        row = redundancy.change[name]
        values.add_row(name, producers[name], f"{change[name]:.3f}", *[f"{row[step - 1]:.3f}" for step in steps])
    heading = (
        "\nrelative change per step of what partitions cut (bytes-weighted mean; small tolerates staleness), and what "
        "the last stage loses by reading it a step old"
    )
    return [Text(heading, style="bold"), table, *_ranking(profile), values]


def _by_bytes(profile: Profile) -> list[Partition]:
    """The two-stage splits that would be chosen if nothing were known of changes, where they differ."""
    batch = min(profile.costs.layers)
    if profile.redundancy is None or any(v.name not in profile.redundancy.change for v in profile.graph.values):
        return []
    mine = {partition.stages for partition in profile.partitions}
    return [
        partition.model_copy(update={"name": f"{partition.name}, by bytes alone"})
        for partition in candidate_partitions(profile.graph, profile.costs.layers[batch])
        if partition.stages not in mine
    ]


def _ranking(profile: Profile) -> list[Text]:
    """How far what is lost tells which errors are larger."""
    ranking = rank_errors(stale_tables(profile))
    if not ranking.pairs:
        return []
    return [Text(
        f"of {ranking.pairs} pairs of tables that differ in the partition alone, the one that loses less was measured "
        f"to err less in {ranking.agreeing}"
    )]


def describe_trust(profile: Profile) -> list[RenderableType]:
    """How the errors were measured, how whole schedules confirm them, and the error bar of a prediction."""
    fit, sampling = profile.compounding, profile.sampling
    parts: list[RenderableType] = []
    if sampling is not None:
        detail = (
            f"errors measured at {sampling.measured_steps} of {profile.num_steps} steps and ages "
            f"{', '.join(map(str, sampling.ages))} on {sampling.prompts} prompts with {sampling.probes} probes each "
            f"(standard error of a value {sampling.estimator_db:.1f} dB)"
        )
        factors = "  ".join(f"{kind} x{weight:.2f}" for kind, weight in sampling.weights.items())
        parts.append(Text(detail + (f"; corrected by whole schedules: {factors}" if factors else "")))
    parts.append(Text(
        "whole schedules, summed errors -> mean PSNR in dB: "
        + "  ".join(f"{raw:.1f}->{measured:.1f}" for raw, measured in fit.knots)
        + f"; residual {fit.residual_db:.2f} dB over {fit.schedules} schedules, {fit.prompts} prompts"
    ))
    if fit.checks:
        heading = "\npredicted against measured, by fits that saw neither the schedules nor their prompts (dB)"
        parts += [Text(heading, style="bold"), _checks_table(profile)]
    return parts


def _checks_table(profile: Profile) -> Table:
    fit = profile.compounding
    table = plain_table(
        "", "schedules", "number", "mean absolute error", "worst", "bias", "prompts each", left=1,
    )
    for kind in (*dict.fromkeys(check.kind for check in fit.checks), None):
        checks = [check for check in fit.checks if kind in (None, check.kind)]
        misses = [check.measured_db - check.predicted_db for check in checks]
        table.add_row(
            kind or "all", str(len(checks)), f"{mean(map(abs, misses)):.2f}", f"{max(misses, key=abs):+.2f}",
            f"{mean(misses):+.2f}", "/".join(sorted({str(check.prompts) for check in checks})),
        )
    return table


def _switching(profile: Profile, guidance: Guidance) -> str:
    rule = paper_schedule(profile, "exact", "cheap")
    found = guidance.tau1(rule.history, rule.eps, rule.tau_cap)
    scale = profile.guidance_scale if guidance.scale is None else guidance.scale
    capped = sum(step == rule.tau_cap for step in found)
    return (
        f"guidance {scale:g}: tau1 (L={rule.history} eps={rule.eps:g} cap={rule.tau_cap}) over {len(found)} prompts: "
        f"mean {mean(found):.1f}, spread {pstdev(found):.1f}, from {min(found)} to {max(found)}, "
        f"at the cap for {capped}"
    )


def _shown(num_steps: int) -> Sequence[int]:
    return sorted({round(position * (num_steps - 1) / 8) for position in range(9)})
