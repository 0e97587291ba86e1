"""What a profile holds as figures: discrepancy, layer times, image errors, predictions, links."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir import Profile
from ..planner.policy import paper_schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["profile_figures"]

_SIZE = (8, 4.2)
_MOST_CURVES = 12
"""Error curves drawn: more cannot be told apart."""
_NAMED_LAYERS = 40
"""Layers whose names fit below the axis."""


def profile_figures(profile: Profile) -> list[Figure]:
    """One figure for everything that the profile has: curves over steps, times by layer, errors, predictions, links."""
    from matplotlib.figure import Figure

    draws = [_draw_layers]
    if profile.guidance is not None:
        draws.insert(0, _draw_guidance)
    if profile.errors:
        draws.append(_draw_errors)
    if profile.compounding.checks:
        draws.append(_draw_checks)
    if profile.costs.links and any(link.points for link in profile.costs.links):
        draws.append(_draw_links)
    figures = []
    for draw in draws:
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.add_subplot(), profile)
        figures.append(figure)
    return figures


def _draw_guidance(axes: Axes, profile: Profile) -> None:
    guidance = profile.guidance
    assert guidance is not None, "drawn where there is one"
    steps = range(profile.num_steps)
    axes.fill_between(steps, guidance.quantile(0.1), guidance.quantile(0.9), alpha=0.25, label="10 to 90 % of prompts")
    axes.plot(steps, guidance.mean, label=f"mean, guidance scale {profile.guidance_scale:g}")
    for further in profile.further_guidance:
        axes.plot(steps, further.mean, linestyle="--", label=f"mean, guidance scale {further.scale:g}")
    rule = paper_schedule(profile, "exact", "cheap")
    switches = guidance.tau1(rule.history, rule.eps, rule.tau_cap)
    axes.axvline(sum(switches) / len(switches), linestyle=":", color="grey", label="tau1 of the published rule, mean")
    axes.set_ylim(bottom=0)
    axes.set(title="Denoising discrepancy (rel-MAE) between the branches", xlabel="step", ylabel="rel-MAE")
    _finish(axes)


def _draw_layers(axes: Axes, profile: Profile) -> None:
    names = profile.graph.names
    for batch, seconds in sorted(profile.costs.layers.items(), reverse=True):
        label = "one branch" if batch == 1 else f"{batch} branches batched"
        axes.bar(
            range(len(names)), [1e3 * value for value in seconds], label=label, width=0.45 if batch == 1 else 0.9,
        )
    axes.set(title="Times of layers", xlabel="layer, in the graph's order", ylabel="ms")
    if len(names) <= _NAMED_LAYERS:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_xlabel("")
    _finish(axes)


def _draw_errors(axes: Axes, profile: Profile) -> None:
    from matplotlib import colormaps

    curves = []
    for entry in profile.errors:
        for curve in entry.curves:
            if curve.gap is None:
                values = [row[0] for row in curve.rmse]
                label = entry.pattern if len(entry.curves) == 1 else f"{entry.pattern}, {curve.source}"
                curves.append((sum(values), label, values))
    curves.sort(key=lambda each: each[0])
    picked = curves if len(curves) <= _MOST_CURVES else [
        curves[round(k * (len(curves) - 1) / (_MOST_CURVES - 1))] for k in range(_MOST_CURVES)
    ]
    axes.set_prop_cycle(color=colormaps["tab20"].colors)  # type: ignore[attr-defined]
    for _, label, values in picked:
        # Steps where a pattern cannot run, or which it leaves as they are, have no place on a logarithmic axis.
        axes.plot(range(len(values)), [value if value > 0 else float("nan") for value in values], label=label)
    some = f", {len(picked)} of {len(curves)} curves" if len(picked) < len(curves) else ""
    axes.set_yscale("log")
    axes.set(
        title=f"Image error of one cheap step, values one step old{some}", xlabel="step",
        ylabel="RMSE of the final image",
    )
    _finish(axes, beside=True)


def _draw_checks(axes: Axes, profile: Profile) -> None:
    checks = profile.compounding.checks
    for kind in dict.fromkeys(check.kind for check in checks):
        of_kind = [check for check in checks if check.kind == kind]
        axes.scatter([check.predicted_db for check in of_kind], [check.measured_db for check in of_kind], label=kind)
    values = [value for check in checks for value in (check.predicted_db, check.measured_db)]
    ends = [min(values), max(values)]
    axes.plot(ends, ends, linestyle=":", color="grey", label="as predicted")
    axes.set(
        title="Whole schedules, by fits that saw neither them nor their prompts", xlabel="predicted PSNR, dB",
        ylabel="measured PSNR, dB",
    )
    _finish(axes)


def _draw_links(axes: Axes, profile: Profile) -> None:
    for link in profile.costs.links:
        if link.points:
            sizes = [size for size, _ in link.points]
            (line,) = axes.plot(sizes, [1e6 * link.seconds(size) for size in sizes], alpha=0.6)
            axes.plot(
                sizes, [1e6 * seconds for _, seconds in link.points], linestyle="", marker=".", color=line.get_color(),
                label=f"rank {link.source} to {link.target}",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(
        title=f"Messages between ranks ({profile.costs.transport}): measured, and latency + bytes / bandwidth",
        xlabel="bytes", ylabel="us",
    )
    _finish(axes, beside=len(profile.costs.links) > 4)


def _finish(axes: Axes, *, beside: bool = False) -> None:
    axes.grid(alpha=0.3)
    if beside:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axes.legend(fontsize=8)
