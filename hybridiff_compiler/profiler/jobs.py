"""One graph to time: said in data, built and sampled in whatever process it ends up in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..backends.cuda_graph import recorder_for
from ..capture import CapturedDenoiser
from ..ir import BRANCHES, Branch, CallSignature, Data, Partition, Pattern, Segment, lower
from ..runtime.segments import SegmentRunner, Slot
from .marks import MarkedWhole
from .timing import wall_timer

__all__ = ["GraphBuilder", "Job", "Sampler", "distinct_segments", "segment_of"]

_SAMPLE_S = 0.2
"""Long enough for a GPU's clocks to fall to what they are in a loop."""
_MOST_REPEATS = 60

Sampler = Callable[[], tuple[float, ...]]
"""Evaluates a graph; seconds per evaluation, or of every layer in graph order."""


class Job(Data):
    """A graph to build and time."""

    kind: Literal["segment", "layers"]
    """A segment of `patterns`, or the whole denoiser with marks between its layers."""
    backend: str
    partitions: tuple[Partition, ...] = ()
    patterns: tuple[Pattern, ...] = ()
    segment: int = 0
    """Position among the distinct segments of `patterns`."""
    batch: int = 1
    """Branches evaluated together."""


def distinct_segments(patterns: Sequence[Pattern]) -> dict[tuple[str, tuple[int, ...], int], Segment]:
    """One segment of every graph that `patterns` launch, by partition, stages and batch."""
    found: dict[tuple[str, tuple[int, ...], int], Segment] = {}
    for pattern in patterns:
        for segment in lower(pattern):
            found.setdefault((segment.partition, segment.stages, len(segment.branches)), segment)
    return found


def segment_of(job: Job) -> Segment:
    """The segment that `job` is about."""
    return list(distinct_segments(job.patterns).values())[job.segment]


class GraphBuilder:
    """Builds the graphs of one denoiser."""

    def __init__(
        self, denoiser: nn.Module, signature: CallSignature, inputs: Mapping[Branch, Mapping[str, Tensor]],
        captured: Mapping[int, CapturedDenoiser] | None = None,
    ) -> None:
        """
        Args:
            denoiser: the network.
            signature: one branch's call.
            inputs: one call per branch, by leaf path, on the denoiser's device.
            captured: graphs by batch, where they are there already.
        """
        self._denoiser, self._signature, self._inputs = denoiser, signature, inputs
        self._device = next(denoiser.parameters()).device
        self._recorder = recorder_for(self._device)
        self._captured = dict(captured or {})
        self._runners: list[tuple[tuple[object, ...], SegmentRunner, dict[Slot, Tensor]]] = []

    @torch.no_grad()
    def sampler(self, job: Job) -> Sampler:
        """Build the graph of `job`: compiled and, on CUDA, recorded. Each call of the result is one sample.

        A segment on a CPU: wall time with the joining of its inputs, as a rank runs it. On CUDA: device time of the
        recorded graph on values that the denoiser really produces, over so many replays that they take 0.2 s.

        Raises:
            UsageError, InputError, PlanMismatchError: see `SegmentRunner`.
        """
        runner, values = self._runner(job)
        if job.kind == "layers":
            leaves = runner.join_inputs(self._inputs, BRANCHES[: job.batch] if job.batch > 1 else BRANCHES[1:])
            marked = MarkedWhole.build(self._capture(runner, job.batch), leaves, job.backend)
            return lambda: tuple(marked.sample())
        segment = segment_of(job)
        self._capture(runner, len(segment.branches))
        run = partial(runner.run, segment, self._inputs, values)
        if self._device.type != "cuda":
            timer = wall_timer(run)
            return torch.no_grad()(lambda: (timer(),))
        run()  # leaves real values in the recorded buffers
        once = max(runner.seconds(segment, repeats=1), 1e-6)
        repeats = max(1, min(_MOST_REPEATS, round(_SAMPLE_S / once)))
        torch.cuda.empty_cache()
        return lambda: (runner.seconds(segment, repeats),)

    def forget(self) -> None:
        """Drop the runners; graphs live on in the samplers that use them."""
        self._runners.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _runner(self, job: Job) -> tuple[SegmentRunner, dict[Slot, Tensor]]:
        """The runner for the tables of `job`, and every value that travels in them."""
        wanted = (job.partitions, job.patterns, job.backend)
        for tables, runner, values in self._runners:
            if tables == wanted:
                return runner, values
        runner = SegmentRunner(
            self._denoiser, self._signature, job.patterns, job.partitions, backend=job.backend,
            recorder=self._recorder, captured=self._captured or None,
        )
        self._capture(runner, 1)
        values = _values(runner, self._inputs)
        self._runners.append((wanted, runner, values))
        return runner, values

    def _capture(self, runner: SegmentRunner, batch: int) -> CapturedDenoiser:
        self._captured[batch] = runner.captured(batch)
        return self._captured[batch]


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
