"""Costs of a denoiser: layers, then the stages cut from them, until measured stages move no cut any more.

A stage compiled as one graph is not the sum of its layers: operations fuse across layers, and a copy is made of what
leaves it. So the partitions solved from layer times are built and timed, layer times are fitted to what was measured,
and the partitions are solved for again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..backends.cuda_graph import recorder_for
from ..ir import WHOLE, Branch, Costs, LayerGraph, LayerTiming, Partition, Pattern, Segment, StageCost
from ..runtime.segments import SegmentRunner
from .costs import (
    Alone,
    LayerMethod,
    LayerTimes,
    StageTime,
    distinct_segments,
    fit_to_stages,
    layers_of,
    measure_layers,
    measure_segments,
    stage_distance,
)
from .precompile import Helpers

__all__ = ["Measured", "Tables", "measure_costs"]

Tables = Callable[[LayerGraph, Sequence[float]], tuple[tuple[Partition, ...], tuple[Pattern, ...]]]
"""From the layer graph and layer times, the partitions and patterns worth measuring (exact ones among them)."""
Progress = Callable[[str, int, int], None]
_Key = tuple[frozenset[str], int]
"""Layers of a segment graph, and how many branches it runs together."""


@dataclass(frozen=True)
class Measured:
    """What came out."""

    costs: Costs
    partitions: tuple[Partition, ...]
    patterns: tuple[Pattern, ...]


def measure_costs(
    denoiser: nn.Module,
    bare: SegmentRunner,
    inputs: Mapping[Branch, Mapping[str, Tensor]],
    tables: Tables,
    *,
    backend: str = "eager",
    method: LayerMethod = "compiled",
    rounds: int = 15,
    max_rounds: int = 3,
    max_seconds: float = math.inf,
    step_overhead_s: float = 0.0,
    alone: Alone = nullcontext,
    helpers: Helpers | None = None,
    on_progress: Progress = lambda stage, done, total: None,
) -> Measured:
    """Measure layers and stages of `denoiser`.

    Args:
        denoiser: the network.
        bare: a runner of it without patterns, for its captures.
        inputs: one call per branch, by leaf path.
        tables: see `Tables`.
        backend: `eager` or `inductor`; on CUDA graphs are recorded and replayed.
        method: see `measure_layers`.
        rounds: samples of each time.
        max_rounds: how often the partitions are solved for and measured, at most. Only new graphs are timed again.
        max_seconds: after which no further round is begun.
        step_overhead_s: taken over into the costs.
        alone: opened around samples.
        helpers: processes that build graphs ahead.
        on_progress: called with (stage of the session, done, total).

    Returns:
        Costs with `LayerTiming`, and the partitions and patterns that the stage costs are of.
    """
    began = time.monotonic()
    graph = bare.layers
    whole = Partition.whole(graph)
    device = next(denoiser.parameters()).device
    inputs = {branch: {path: leaf.to(device) for path, leaf in leaves.items()} for branch, leaves in inputs.items()}
    helpers = helpers or Helpers(None, 0, backend=backend)

    @contextmanager
    def undisturbed() -> Iterator[None]:
        with alone(), helpers.paused():
            yield

    exact = tuple(p for p in tables(graph, [layer.flops + 1.0 for layer in graph.layers])[1] if p.partition == WHOLE)
    known: dict[_Key, StageCost] = {}

    def time_new(partitions: tuple[Partition, ...], patterns: tuple[Pattern, ...]) -> dict[Segment, _Key]:
        """Time the segments of `patterns` whose graph was not timed before; which graph each of them is."""
        runner = SegmentRunner(
            denoiser, bare.signature, patterns, partitions, backend=backend, recorder=recorder_for(device),
            captured={batch: bare.captured(batch) for batch in (1, 2)},
        )
        stages = {partition.name: partition for partition in (*partitions, whole)}
        segments = {
            segment: (layers_of(runner, segment, stages), len(segment.branches))
            for segment in distinct_segments(patterns).values()
        }
        new = [segment for segment, key in segments.items() if key not in known]
        if partitions:
            helpers.start(bare.signature, partitions, patterns, new)
        helpers.wait()
        measured = measure_segments(
            runner, inputs, new, rounds=rounds, alone=undisturbed,
            on_progress=lambda done, total: on_progress("stage times", done, total),
        )
        known.update({segments[segment]: cost for segment, cost in zip(new, measured)})
        del runner
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return segments

    # The whole denoiser is timed without the values that cheap steps want of it: they cost next to nothing, and its
    # graph would change with every partition.
    helpers.start(bare.signature, (), exact, list(distinct_segments(exact).values()))
    raw = measure_layers(
        bare, inputs, backend=backend, method=method, rounds=rounds, alone=undisturbed,
        on_progress=lambda done, total: on_progress("layer times", done, total),
    )
    time_new((), exact)
    whole_s = {batch: cost.seconds for (_, batch), cost in known.items()}
    raw_sum = {batch: sum(raw[batch].seconds) / seconds for batch, seconds in whole_s.items()}
    raw = {batch: times.scaled_to(whole_s[batch]) if batch in whole_s else times for batch, times in raw.items()}
    layers = dict(raw)
    partitions: tuple[Partition, ...] = ()
    patterns: tuple[Pattern, ...] = ()
    timing = LayerTiming(
        method=raw[1].method, spread={b: _rounded(times.spread) for b, times in raw.items()}, settled=False
    )
    for count in range(1, max_rounds + 1):
        solved = tables(graph, layers[1].seconds)
        settled = solved[0] == partitions
        if settled or (count > 1 and time.monotonic() - began > max_seconds):
            timing = timing.model_copy(update={"settled": settled})
            break
        partitions, patterns = solved
        keys = time_new(partitions, patterns)
        measured = _stages(known, 1)
        before = stage_distance(graph.names, raw[1].seconds, measured)
        layers = {batch: _fitted(graph, times, known, batch) for batch, times in raw.items()}
        timing = timing.model_copy(update={
            "rounds": count, "stage_residual": before,
            "fitted_residual": stage_distance(graph.names, layers[1].seconds, measured),
        })
    else:
        timing = timing.model_copy(update={"settled": tables(graph, layers[1].seconds)[0] == partitions})
    timing = timing.model_copy(update={"whole_s": whole_s, "raw_sum": raw_sum})
    return Measured(
        Costs(
            layers={batch: times.seconds for batch, times in layers.items()}, timing=timing,
            stages=tuple(
                known[key].model_copy(update={"partition": segment.partition, "stages": segment.stages})
                for segment, key in keys.items()
            ),
            step_overhead_s=step_overhead_s,
        ),
        partitions, patterns,
    )


def _stages(known: Mapping[_Key, StageCost], batch: int) -> list[StageTime]:
    return [
        StageTime(names, cost.seconds, cost.spread) for (names, branches), cost in known.items() if branches == batch
    ]


def _fitted(graph: LayerGraph, times: LayerTimes, known: Mapping[_Key, StageCost], batch: int) -> LayerTimes:
    """Layers fitted to the stages that were timed at their batch, the sum being that of the whole."""
    stages = _stages(known, batch)
    if not stages:
        return times
    fitted = replace(times, seconds=fit_to_stages(graph.names, times.seconds, stages))
    return fitted.scaled_to(sum(times.seconds))


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.3g}") for value in values)
