"""Times of layers and of segment graphs, as they will run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from ..ir import BRANCHES, Branch, Partition, Pattern, Segment, StageCost, lower
from ..runtime.segments import SegmentRunner, Slot
from .marks import MarkedWhole
from .timing import Timing, sample_in_turns, time_together

__all__ = ["Alone", "LayerMethod", "LayerTimes", "StageTime", "distinct_segments", "fit_to_stages",
           "layers_of", "measure_layers", "measure_segments", "stage_distance"]

Progress = Callable[[int, int], None]
Alone = Callable[[], AbstractContextManager[object]]
"""Opened around samples; may wait until nobody else uses the machine."""

LayerMethod = Literal["compiled", "eager"]
"""Which graph of the whole the marks between layers are put in."""

_SAMPLE_S = 0.1
_WITHIN = (0.2, 5.0)
"""How far stages may rescale a layer."""
_LOYALTY = 1e-2
"""Weight of staying near the layer's own measurement, against one stage's."""


_SPREAD = 0.03
"""Relative spread at which a stage's word counts for about two thirds."""


@dataclass(frozen=True)
class StageTime:
    """A measured stage, for fitting layers to it."""

    layers: frozenset[str]
    seconds: float
    spread: float = 0.0
    """Relative inter-quartile range."""


@dataclass(frozen=True)
class LayerTimes:
    """Layers of the whole denoiser at one batch size."""

    seconds: tuple[float, ...]
    """In graph order."""
    spread: tuple[float, ...]
    """Relative inter-quartile range of each."""
    method: Literal["wall", "graph", "compiled", "eager-graph"]
    """As in `LayerTiming`."""

    def scaled_to(self, whole_s: float) -> LayerTimes:
        """With all layers scaled so that their sum is `whole_s` seconds."""
        factor = whole_s / sum(self.seconds)
        return replace(self, seconds=tuple(value * factor for value in self.seconds))


@torch.no_grad()
def measure_layers(
    runner: SegmentRunner,
    inputs: Mapping[Branch, Mapping[str, Tensor]],
    batches: Sequence[int] = (1, 2),
    *,
    backend: str = "eager",
    method: LayerMethod = "compiled",
    rounds: int = 15,
    alone: Alone = nullcontext,
    on_progress: Progress = lambda done, total: None,
) -> dict[int, LayerTimes]:
    """Time of every layer, in place: between marks in one run of the whole denoiser (see `marks`).

    With `backend` inductor and method `compiled`, the whole is compiled with its marks at batch 1 only, since that
    takes minutes. The uncompiled graph is marked at every batch, and what compiling gained each layer at batch 1 it is
    taken to gain at the others. With method `eager` the uncompiled graph's shares stand for the compiled ones.

    Args:
        runner: has the captures.
        inputs: of both branches, by leaf path.
        batches: numbers of branches batched together, 1 among them.
        backend: what will run, `eager` or `inductor`.
        method: see above; both are the same for backend `eager`.
        rounds: evaluations, of which the median counts.
        alone: see `Alone`.
        on_progress: called with (done, total).

    Returns:
        Per batch, times as they come: not yet scaled to the whole.
    """
    total = len(batches) + (backend != "eager" and method == "compiled")
    done = 0
    on_progress(done, total)
    plain: dict[int, tuple[Timing, ...]] = {}
    device = next(iter(inputs["cond"].values())).device
    for batch in batches:
        leaves = runner.join_inputs(inputs, BRANCHES[:batch] if batch > 1 else BRANCHES[1:])
        plain[batch] = MarkedWhole.build(runner.captured(batch), leaves, "eager").times(rounds, alone=alone)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        done += 1
        on_progress(done, total)
    shown: Literal["wall", "graph", "compiled", "eager-graph"] = "wall" if device.type != "cuda" else "graph"
    gain = np.ones(len(runner.layers.layers))
    spread = {batch: tuple(timing.spread for timing in timings) for batch, timings in plain.items()}
    if backend != "eager":
        shown = "eager-graph"
    if total > done:
        marked = MarkedWhole.build(runner.captured(1), runner.join_inputs(inputs, BRANCHES[1:]), backend)
        compiled = marked.times(rounds, alone=alone)
        gain = _seconds(compiled) / np.maximum(_seconds(plain[1]), 1e-9)
        spread[1] = tuple(timing.spread for timing in compiled)
        shown = "compiled"
        on_progress(total, total)
    return {
        batch: LayerTimes(tuple((_seconds(timings) * gain).tolist()), spread[batch], shown)
        for batch, timings in plain.items()
    }


def _seconds(timings: Iterable[Timing]) -> np.ndarray:
    return np.array([max(timing.median, 1e-9) for timing in timings])


def distinct_segments(patterns: Iterable[Pattern]) -> dict[tuple[str, tuple[int, ...], int], Segment]:
    """One segment of every graph that `patterns` launch, by partition, stages and batch."""
    found: dict[tuple[str, tuple[int, ...], int], Segment] = {}
    for pattern in patterns:
        for segment in lower(pattern):
            found.setdefault((segment.partition, segment.stages, len(segment.branches)), segment)
    return found


@torch.no_grad()
def measure_segments(
    runner: SegmentRunner,
    inputs: Mapping[Branch, Mapping[str, Tensor]],
    segments: Iterable[Segment],
    *,
    rounds: int = 15,
    alone: Alone = nullcontext,
    on_progress: Progress = lambda done, total: None,
) -> tuple[StageCost, ...]:
    """Time of segment graphs, in turns.

    On a CPU: wall time of a segment with the joining of its inputs, as a rank runs it. With a recording runner (CUDA):
    device time of the recorded graph on values that the denoiser really produces.

    Args:
        runner: for the patterns that the segments are from; its backend is what is timed.
        inputs: of both branches, by leaf path.
        segments: one per distinct graph.
        rounds, alone: see `time_together`.
        on_progress: called with (done, total), while graphs are built and while they are timed.
    """
    segments = list(segments)
    values = _values(runner, inputs)
    device = next(iter(inputs["cond"].values())).device
    runner.prepare(segments, on_progress)
    runs: list[Callable[[], object]] = [partial(runner.run, segment, inputs, values) for segment in segments]
    if device.type == "cuda":
        for run in runs:
            run()  # leaves real values in the recorded buffers
        timers = [partial(runner.seconds, segment, _repeats(runner, segment)) for segment in segments]
        timings = sample_in_turns(timers, rounds=rounds, alone=alone, on_round=on_progress)
    else:
        timings = time_together(runs, device, rounds=rounds, alone=alone, on_round=on_progress)
    return tuple(
        StageCost(
            partition=segment.partition, stages=segment.stages, batch=len(segment.branches), seconds=timing.median,
            spread=timing.spread,
        )
        for segment, timing in zip(segments, timings)
    )


def _repeats(runner: SegmentRunner, segment: Segment) -> int:
    """Replays in one sample: a tenth of a second's worth, ten at most."""
    return max(1, min(10, int(_SAMPLE_S / max(runner.seconds(segment, 1), 1e-6))))


def _values(runner: SegmentRunner, inputs: Mapping[Branch, Mapping[str, Tensor]]) -> dict[Slot, Tensor]:
    """Every value that travels, of both branches; by the uncompiled graph, which costs no compilation."""
    if not runner.taps:
        return {}
    whole = runner.captured(1).whole(runner.taps)
    values: dict[Slot, Tensor] = {}
    for branch in BRANCHES:
        results = whole.module(*[inputs[branch][path] for path in whole.inputs])
        values.update({(branch, name): value for name, value in zip(whole.values_out, results[1:])})
    return values


def fit_to_stages(
    names: Sequence[str], seconds: Sequence[float], stages: Iterable[StageTime]
) -> tuple[float, ...]:
    """Layer times that agree with measured stages.

    Least squares over factors r of the layers: `sum over stages of v (sum of r_i t_i in it / measured - 1)^2 +
    w * sum of share_i (r_i - 1)^2`, r within 0.2 to 5; v falls with the stage's spread. Layers
    that always share a stage keep their ratios; a stage that comes out slower than its layers makes all of them slower.

    Args:
        names: layers in graph order.
        seconds: their times t.
        stages: the measured stages, whole denoiser included.
    """
    times = np.asarray(seconds, dtype=float)
    rows, wanted = [], []
    for stage in stages:
        trust = 1 / np.hypot(1.0, stage.spread / _SPREAD)
        rows.append(trust * np.where([name in stage.layers for name in names], times / stage.seconds, 0.0))
        wanted.append(trust)
    loyal = np.sqrt(_LOYALTY * times / times.sum())
    matrix = np.vstack([*rows, np.diag(loyal)])
    solution = lsq_linear(matrix, np.concatenate([wanted, loyal]), bounds=_WITHIN)
    return tuple((solution.x * times).tolist())


def stage_distance(
    names: Sequence[str], seconds: Sequence[float], stages: Iterable[StageTime]
) -> float:
    """Largest relative distance between a measured stage and the sum of its layers."""
    by_name = dict(zip(names, seconds))
    return max(
        (abs(sum(by_name[name] for name in stage.layers) / stage.seconds - 1) for stage in stages), default=0.0
    )


def layers_of(runner: SegmentRunner, segment: Segment, partitions: Mapping[str, Partition]) -> frozenset[str]:
    """Names of the layers that a segment's graph evaluates: of its stages, those that its results depend on.

    Where the values that a stage passes on are read by nobody (an inner run whose results are reused), the layers that
    only they depend on are left out of its graph.
    """
    graph = runner.layers
    inside = {name for stage in segment.stages for name in partitions[segment.partition].stages[stage]}
    taps = {name for _, name in runner.values_written(segment)}
    live = {value.producer for value in graph.values if value.name in taps} | ({graph.output} & inside)
    for value in reversed(graph.values):  # producers come before consumers
        if value.producer in inside and not live.isdisjoint(value.consumers):
            live.add(value.producer)
    return frozenset(live)
