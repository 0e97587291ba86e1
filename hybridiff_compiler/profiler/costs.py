"""Times of layers and of segment graphs, as they will run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..backends import compile_stage
from ..ir import BRANCHES, Branch, Pattern, Segment, StageCost, lower
from ..runtime.segments import SegmentRunner, Slot
from .timing import time_together

__all__ = ["measure_layers", "measure_segments"]

Progress = Callable[[int, int], None]


@torch.no_grad()
def measure_layers(
    runner: SegmentRunner,
    inputs: Mapping[Branch, Mapping[str, Tensor]],
    branches: int,
    *,
    backend: str = "eager",
    rounds: int = 9,
    on_progress: Progress = lambda done, total: None,
) -> tuple[tuple[float, ...], float]:
    """Time of every layer at `branches` branches batched together.

    Each layer is extracted as a stage of its own, run on the values that the layers before it produced, and timed;
    the times are then scaled so that their sum is the time of the whole denoiser as one graph.

    Returns:
        Seconds per layer in graph order, and the seconds of the whole.
    """
    captured = runner.captured(branches)
    leaves = runner.join_inputs(inputs, BRANCHES[:branches] if branches > 1 else BRANCHES[1:])
    produced: dict[str, list[str]] = {name: [] for name in captured.layers.names}
    for value in captured.layers.values:
        produced[value.producer].append(value.name)
    values: dict[str, Tensor] = {}
    calls: list[Callable[[], object]] = []
    device = next(iter(leaves.values())).device
    for name in captured.layers.names:
        stage = captured.extract([name], produced[name])
        arguments = [leaves[path] for path in stage.inputs] + [values[value] for value in stage.values_in]
        results = stage.module(*arguments)
        values.update(zip(stage.values_out, results[1:] if stage.has_estimate else results))
        executable = compile_stage(stage, backend)
        calls.append(lambda run=executable, args=arguments: run(*args))  # type: ignore[misc]
    whole = captured.extract(captured.layers.names)
    executable = compile_stage(whole, backend)
    arguments = [leaves[path] for path in whole.inputs]
    calls.append(lambda: executable(*arguments))
    *layers, total = time_together(calls, device, rounds=rounds, on_round=on_progress)
    scale = total.median / sum(timing.median for timing in layers)
    return tuple(timing.median * scale for timing in layers), total.median


@torch.no_grad()
def measure_segments(
    runner: SegmentRunner,
    inputs: Mapping[Branch, Mapping[str, Tensor]],
    exact: Pattern,
    patterns: Iterable[Pattern],
    *,
    rounds: int = 15,
    on_progress: Progress = lambda done, total: None,
) -> tuple[StageCost, ...]:
    """Time of every distinct segment graph that `patterns` launch, whole denoiser included."""
    values: dict[Slot, Tensor] = {}
    for segment in lower(exact):
        values.update(runner.run(segment, inputs, values)[1])
    segments: dict[tuple[str, tuple[int, ...], int], Segment] = {}
    for pattern in patterns:
        for segment in lower(pattern):
            segments.setdefault((segment.partition, segment.stages, len(segment.branches)), segment)
    device = next(iter(inputs["cond"].values())).device
    calls: list[Callable[[], object]] = [
        lambda segment=segment: runner.run(segment, inputs, values)  # type: ignore[misc]
        for segment in segments.values()
    ]
    timings = time_together(calls, device, rounds=rounds, on_round=on_progress)
    return tuple(
        StageCost(partition=partition, stages=stages, batch=batch, seconds=timing.median, spread=timing.spread)
        for (partition, stages, batch), timing in zip(segments, timings)
    )

