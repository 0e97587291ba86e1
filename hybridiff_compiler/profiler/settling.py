"""Costs of a denoiser: layers, then the stages cut from them, until measured stages move no cut any more.

A stage compiled as one graph is not the sum of its layers: operations fuse across layers, and a copy is made of what
leaves it. So the partitions solved from layer times are built and timed, layer times are fitted to what was measured,
and the partitions are solved for again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..ir import BRANCHES, WHOLE, Branch, Costs, LayerGraph, LayerTiming, Partition, Pattern, Segment, StageCost
from ..runtime.segments import SegmentRunner
from .costs import LayerMethod, LayerTimes, StageTime, fit_to_stages, layer_times, stage_distance
from .jobs import Job, distinct_segments
from .marks import MarkedWhole
from .timers import Timers
from .timing import Timing

__all__ = ["Measured", "Tables", "measure_costs"]

Tables = Callable[[LayerGraph, Sequence[float]], tuple[tuple[Partition, ...], tuple[Pattern, ...]]]
"""From the layer graph and layer times, the partitions and patterns worth measuring (exact ones among them)."""
Progress = Callable[[str, int, int], None]
_Key = tuple[frozenset[tuple[str, float]], int]
"""What a segment graph evaluates of which layers, and how many branches it runs together."""

_MARKED = "layers of the compiled whole"
_STILL = 0.01
"""A cut that moves less of the denoiser's time than this from one stage to another has not moved."""


@dataclass(frozen=True)
class Measured:
    """What came out."""

    costs: Costs
    partitions: tuple[Partition, ...]
    patterns: tuple[Pattern, ...]


def measure_costs(
    bare: SegmentRunner,
    inputs: Mapping[Branch, Mapping[str, Tensor]],
    tables: Tables,
    timers: Timers,
    *,
    backend: str = "eager",
    method: LayerMethod = "compiled",
    rounds: int = 15,
    max_rounds: int = 3,
    max_seconds: float = math.inf,
    on_progress: Progress = lambda stage, done, total: None,
) -> Measured:
    """Measure layers and stages of a denoiser.

    Args:
        bare: a runner of it without patterns, for its captures.
        inputs: one call per branch, by leaf path.
        tables: see `Tables`.
        timers: who builds and times graphs of the same denoiser and inputs.
        backend: `eager` or `inductor`; on CUDA graphs are recorded and replayed.
        method: with `compiled`, layers are also marked in the compiled whole (see `costs.layer_times`); with `eager`
            the uncompiled graph's shares stand for the compiled ones.
        rounds: samples of each time.
        max_rounds: how often the partitions are solved for and measured, at most. Only new graphs are timed again.
        max_seconds: after which nothing more is built. What is missing then is noted in the `LayerTiming`.
        on_progress: called with (stage of the session, done, total).

    Returns:
        Costs with `LayerTiming`, and the partitions and patterns that the stage costs are of.
    """
    session = _Session(bare, inputs, timers, backend, rounds, time.monotonic() + max_seconds, on_progress)
    graph = bare.layers
    exact = tuple(p for p in tables(graph, [layer.flops + 1.0 for layer in graph.layers])[1] if p.partition == WHOLE)
    marked = backend != "eager" and method == "compiled"
    # The whole denoiser is timed without the values that cheap steps want of it: they cost next to nothing, and its
    # graph would change with every partition.
    wholes = session.start((), exact)
    if marked:
        timers.start({_MARKED: Job(kind="layers", backend=backend)})
    plain = {1: session.plain_layers(1)}
    first: tuple[tuple[Partition, ...], tuple[Pattern, ...]] | None = None
    guessed: dict[Segment, _Key] = {}
    if timers.ahead:  # a guess that costs no waiting, and is mostly right
        first = tables(graph, layer_times(plain, None)[1].seconds)
        guessed = session.start(*first)
    plain[2] = session.plain_layers(2)
    times = session.finish()
    raw = layer_times(plain, times.get(_MARKED))
    known = session.known
    whole_s = {key[1]: known[key].seconds for key in wholes.values() if key in known}
    raw_sum = {batch: sum(raw[batch].seconds) / seconds for batch, seconds in whole_s.items() if batch in raw}
    factor = next((1 / raw_sum[batch] for batch in (1, 2) if batch in raw_sum), 1.0)
    raw = {batch: each.scaled_to(whole_s.get(batch, factor * sum(each.seconds))) for batch, each in raw.items()}

    layers = dict(raw)
    candidate = tables(graph, raw[1].seconds)
    if first is not None and _unmoved(graph, raw[1].seconds, first[0], candidate[0]):
        candidate = first
    best, keys, count, settled = candidate, dict[Segment, _Key](), 0, False
    residuals: dict[str, float] = {}
    while count < max_rounds:
        wanted = session.start(*candidate)
        session.finish()
        if not all(key in known for key in wanted.values()):  # there was no time for these
            if count == 0 and first is not None and all(key in known for key in guessed.values()):
                candidate, wanted = first, guessed
            elif count:
                break  # what was complete before stays
        best, keys, count = candidate, wanted, count + 1
        stages = session.stages(1)
        layers = {batch: _fitted(graph, each, session.stages(batch)) for batch, each in raw.items()}
        if stages:
            residuals = {
                "stage_residual": stage_distance(graph.names, raw[1].seconds, stages),
                "fitted_residual": stage_distance(graph.names, layers[1].seconds, stages),
            }
        candidate = tables(graph, layers[1].seconds)
        complete = all(key in known for key in keys.values())
        settled = complete and _unmoved(graph, layers[1].seconds, best[0], candidate[0])
        if settled or session.late:
            break
    missing = [f"{s.partition} {','.join(map(str, s.stages))} x{key[1]}" for s, key in keys.items() if key not in known]
    timing = LayerTiming(
        method=_method(bare, backend, whole_s, marked and _MARKED in times),
        spread={batch: _rounded(each.spread) for batch, each in raw.items()}, whole_s=whole_s, raw_sum=raw_sum,
        rounds=count, settled=settled,
        missing=(*missing, *([_MARKED] if marked and _MARKED not in times else [])), **residuals,
    )
    return Measured(
        Costs(
            layers={batch: each.seconds for batch, each in layers.items()}, timing=timing,
            stages=tuple(
                known[key].model_copy(update={"partition": segment.partition, "stages": segment.stages})
                for segment, key in keys.items() if key in known
            ),
        ),
        *best,
    )


class _Session:
    """What has been asked of the timers, and what they found."""

    def __init__(
        self, bare: SegmentRunner, inputs: Mapping[Branch, Mapping[str, Tensor]], timers: Timers, backend: str,
        rounds: int, deadline: float, on_progress: Progress,
    ) -> None:
        self._bare, self._timers, self._backend, self._rounds = bare, timers, backend, rounds
        self._deadline, self._progress = deadline, on_progress
        self._device = next(iter(inputs["cond"].values())).device
        self._inputs = inputs
        self._asked: dict[_Key, tuple[str, Segment]] = {}
        self.known: dict[_Key, StageCost] = {}

    @property
    def late(self) -> bool:
        """Whether nothing more is to be built."""
        return time.monotonic() > self._deadline

    @torch.no_grad()
    def plain_layers(self, batch: int) -> tuple[Timing, ...]:
        """Times of the layers of the uncompiled whole."""
        self._progress("layer times", batch - 1, 2)
        captured = self._bare.captured(batch)
        leaves = self._bare.join_inputs(self._inputs, BRANCHES[:batch] if batch > 1 else BRANCHES[1:])
        with self._timers.undisturbed():
            timings = MarkedWhole.build(captured, leaves, "eager").times(self._rounds)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._progress("layer times", batch, 2)
        return timings

    def start(self, partitions: tuple[Partition, ...], patterns: tuple[Pattern, ...]) -> dict[Segment, _Key]:
        """Have the graphs that `patterns` launch built, unless they were already; what each segment evaluates."""
        captured = self._bare.captured(1)
        stages = {each.name: each for each in (*partitions, Partition.whole(self._bare.layers))}
        keys: dict[Segment, _Key] = {}
        jobs: dict[Hashable, Job] = {}
        for partition in dict.fromkeys(pattern.partition for pattern in patterns):
            # A plan has few patterns: a stage is timed without the values that those on other cuts would want of it.
            used = tuple(pattern for pattern in patterns if pattern.partition == partition)
            cut = tuple(each for each in partitions if each.name == partition)
            runner = SegmentRunner(
                self._bare.denoiser, self._bare.signature, used, cut, backend=self._backend, captured={1: captured},
            )
            for number, segment in enumerate(distinct_segments(used).values()):
                taps = dict.fromkeys(name for _, name in runner.values_written(segment))
                shares = captured.shares(stages[partition].evaluated(segment.stages), taps)
                key = (frozenset((name, round(part, 3)) for name, part in shares.items()), len(segment.branches))
                keys[segment] = key
                if key not in self._asked:
                    name = f"{partition} {','.join(map(str, segment.stages))} x{key[1]} #{len(self._asked)}"
                    self._asked[key] = (name, segment)
                    jobs[name] = Job(
                        kind="segment", backend=self._backend, partitions=cut, patterns=used, segment=number,
                        batch=key[1],
                    )
        self._timers.start(dict(sorted(jobs.items(), key=lambda job: -job[1].batch)))
        return keys

    def finish(self) -> Mapping[Hashable, tuple[Timing, ...]]:
        """Wait for what was started, and time it."""
        times = self._timers.finish(
            self._rounds, self._deadline, lambda done, total: self._progress("stage times", done, total)
        )
        for key, (name, segment) in self._asked.items():
            if name in times:
                (timing,) = times[name]
                self.known[key] = StageCost(
                    partition=segment.partition, stages=segment.stages, batch=key[1], seconds=timing.median,
                    spread=timing.spread,
                )
        return times

    def stages(self, batch: int) -> list[StageTime]:
        """What was timed at a batch."""
        return [
            StageTime(dict(shares), cost.seconds, cost.spread)
            for (shares, branches), cost in self.known.items() if branches == batch
        ]


def _unmoved(
    graph: LayerGraph, seconds: Sequence[float], before: Sequence[Partition], after: Sequence[Partition]
) -> bool:
    """Whether the same partitions have the same stages, but for a hundredth of the denoiser's time."""
    if [(p.name, len(p.stages)) for p in before] != [(p.name, len(p.stages)) for p in after]:
        return False
    took = dict(zip(graph.names, seconds))
    most = _STILL * math.fsum(seconds)
    return all(
        math.fsum(took[name] for name in set(old) ^ set(new)) <= most
        for one, other in zip(before, after) for old, new in zip(one.stages, other.stages)
    )


def _method(
    bare: SegmentRunner, backend: str, whole_s: Mapping[int, float], compiled: bool
) -> Literal["wall", "graph", "compiled", "eager-graph"]:
    if compiled:
        return "compiled"
    if backend != "eager" and whole_s:
        return "eager-graph"
    return "graph" if next(bare.denoiser.parameters()).is_cuda else "wall"


def _fitted(graph: LayerGraph, times: LayerTimes, stages: Sequence[StageTime]) -> LayerTimes:
    """Layers fitted to the stages that were timed at their batch, the sum staying that of the whole."""
    if not stages:
        return times
    fitted = replace(times, seconds=fit_to_stages(graph.names, times.seconds, stages))
    return fitted.scaled_to(sum(times.seconds))


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.3g}") for value in values)
