"""A plan as a picture and as a trace: what every rank computes, when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir import BRANCHES, Plan, Segment, lower, write_text_atomically
from ..planner.forecast import Forecast, ForecastStep, Span
from .strip import representative_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["save_trace", "timeline_figure", "without_times"]

_BRANCH_COLOURS = {("uncond",): "tab:blue", ("cond",): "tab:orange", BRANCHES: "tab:green"}
_BRANCH_NAMES = {("uncond",): "unconditional branch", ("cond",): "conditional branch", BRANCHES: "both, batched"}


def without_times(plan: Plan) -> Forecast:
    """Where no profile tells: every step takes one unit, and every rank divides it among its graphs."""
    steps = []
    for number, name in enumerate(representative_steps(plan.schedule)):
        spans = []
        segments = lower(plan.pattern(name))
        for rank in range(plan.world_size):
            own = [segment for segment in segments if segment.rank == rank]
            for index, segment in enumerate(own):
                start = number + index / len(own)
                spans.append(Span(segment=segment, start_s=start, end_s=start + 1 / len(own)))
        steps.append(ForecastStep(pattern=name, start_s=number, end_s=number + 1, spans=tuple(spans)))
    return Forecast(ranks=plan.world_size, steps=tuple(steps))


def timeline_figure(plan: Plan, times: Forecast | None = None) -> Figure:
    """What every rank computes over the denoising loop: the whole denoiser as tall bars, single stages as thin ones.

    Args:
        plan: the plan.
        times: from `planner.forecast`; None: the axis counts steps.
    """
    from matplotlib.figure import Figure

    shown = times or without_times(plan)
    figure = Figure(figsize=(11, 1.8 + 0.45 * shown.ranks), layout="constrained")
    axes = figure.add_subplot()
    scale = 1.0 if times is None else 1e3
    used = set()
    for step in shown.steps:
        for span in step.spans:
            stages = plan.pattern(step.pattern).stages
            lower_edge, height = _lane(span.segment, stages)
            axes.broken_barh(
                [(scale * span.start_s, scale * (span.end_s - span.start_s))],
                (span.segment.rank + lower_edge, height), facecolors=_BRANCH_COLOURS[span.segment.branches],
                edgecolor="white", linewidth=0.4,
            )
            used.add(span.segment.branches)
    for branches in (branches for branches in _BRANCH_COLOURS if branches in used):
        axes.broken_barh([], (0, 0), facecolors=_BRANCH_COLOURS[branches], label=_BRANCH_NAMES[branches])
    axes.set_ylim(shown.ranks - 0.5, -0.5)
    axes.set_yticks(range(shown.ranks), [f"rank {rank}" for rank in range(shown.ranks)])
    axes.set_xlim(0, max(scale * shown.seconds, 1e-9))
    what = "step" if times is None else f"ms, predicted; {1e3 * shown.seconds:.4g} for the denoising loop"
    axes.set(
        title=f"{plan.model.name} on {plan.world_size} ranks, {len(shown.steps)} steps (thin: some of the stages only; "
        "white: nothing)", xlabel=what,
    )
    if used:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def save_trace(times: Forecast, path: Path) -> Path:
    """Write a forecast as a Chrome trace, for Perfetto or chrome://tracing: a lane per rank, and one of the steps."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "predicted denoising loop"}},
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": 0, "args": {"name": "steps"}},
    ]
    events += [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": 1 + rank, "args": {"name": f"rank {rank}"}}
        for rank in range(times.ranks)
    ]
    for number, step in enumerate(times.steps):
        events.append(_event(f"{number} {step.pattern}", 0, step.start_s, step.end_s, {"step": number}))
        for span in step.spans:
            segment = span.segment
            events.append(_event(
                str(segment), 1 + segment.rank, span.start_s, span.end_s,
                {"step": number, "pattern": step.pattern, "branches": list(segment.branches),
                 "partition": segment.partition, "stages": list(segment.stages)},
            ))
    return write_text_atomically(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def _event(name: str, lane: int, start_s: float, end_s: float, details: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X", "name": name, "pid": 0, "tid": lane, "ts": 1e6 * start_s, "dur": 1e6 * (end_s - start_s),
        "args": details,
    }


def _lane(segment: Segment, stages: int) -> tuple[float, float]:
    """Lower edge and height of a bar about its rank's line."""
    if len(segment.stages) == stages:
        return -0.4, 0.8
    return -0.2, 0.4
