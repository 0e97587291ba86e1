"""Where the time of a whole denoiser goes: marks between its layers, noted while it runs as one graph.

A mark is put behind the last operation of every layer. On a CPU it reads the clock. On CUDA it records an event, and
the graph is captured as one CUDA graph with its marks, so what is read is device time of the layers in the place where
they run, without launch overhead. In a compiled graph a mark is an operation that reads what the layer passes on and
writes to one token, which chains the marks to each other: the compiler may fuse across a layer's border but moves no
mark before the values it waits for. Work that the compiler pulls forward counts for the layer it ends up in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, fx

from ..backends import compile_stage
from ..backends.cuda_graph import CudaRecorder
from ..backends.hoisting import Hoisted
from ..capture import CapturedDenoiser, StageGraph
from .timing import FEWEST, Timing, host_clock, summary

__all__ = ["MarkedWhole"]

_TOKEN = "mark_token"
_LONG_S = 0.3
_BUSY_S = 0.1


class _Clock(Protocol):
    def note(self, index: int) -> None:
        """Time number `index` is now (on CUDA: when the stream gets here)."""

    def gaps(self) -> list[float]:
        """Seconds between each time and the next one."""


class _WallClock:
    def __init__(self, marks: int) -> None:
        self._times = [0.0] * marks
        self._clock = host_clock()

    def note(self, index: int) -> None:
        self._times[index] = self._clock()

    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self._times, self._times[1:])]


class _DeviceClock:
    def __init__(self, marks: int) -> None:
        # External events become nodes of a captured graph, so that every replay records them anew.
        self._events = [torch.cuda.Event(enable_timing=True, external=True) for _ in range(marks)]

    def note(self, index: int) -> None:
        self._events[index].record()

    def gaps(self) -> list[float]:
        torch.cuda.synchronize()  # an event that a graph records cannot be waited for before the graph gets there
        return [before.elapsed_time(after) / 1e3 for before, after in zip(self._events, self._events[1:])]


_running: list[_Clock] = []
"""The clock of the evaluation under way: an operation of a compiled graph cannot carry one."""


# Flexible layout: the compiler must not convert what a mark reads to the strides of the uncompiled graph.
@torch.library.custom_op("hybridiff::mark", mutates_args={"token"}, tags=(torch.Tag.flexible_layout,))
def _mark(token: Tensor, after: Sequence[Tensor], index: int) -> None:
    if _running:
        _running[-1].note(index)


@_mark.register_fake
def _(token: Tensor, after: Sequence[Tensor], index: int) -> None:
    return None


@dataclass
class MarkedWhole:
    """A whole denoiser that can be sampled for the times of its layers."""

    layers: tuple[str, ...]
    sample: Callable[[], list[float]]
    """Evaluates once; seconds of each layer, in graph order."""

    @classmethod
    def build(
        cls, captured: CapturedDenoiser, leaves: Mapping[str, Tensor], backend: str
    ) -> MarkedWhole:
        """Insert the marks, compile with `backend`, warm up, and capture on CUDA.

        Args:
            captured: the denoiser at the batch size to measure.
            leaves: its inputs, by leaf path.
            backend: `eager` or `inductor`.
        """
        device = next(iter(leaves.values())).device
        stage = _marked(captured, plain=backend == "eager")
        arguments = [leaves[path] for path in stage.inputs]
        if backend != "eager":
            arguments.append(torch.zeros(1, device=device))
        call = compile_stage(stage, backend)
        if isinstance(call, Hoisted):  # not computed at every step: no layer's time
            with torch.no_grad():
                arguments = [argument.clone() for argument in call.given(arguments)]
            call = call.each
        count = len(captured.layers.names) + 1
        clock: _Clock = _DeviceClock(count) if device.type == "cuda" else _WallClock(count)

        def evaluate(*inputs: Tensor) -> Sequence[Tensor]:
            clock.note(0)
            return call(*inputs)

        replay: Callable[[], object] = lambda: evaluate(*arguments)  # noqa: E731
        with _noting(clock), torch.no_grad():
            if device.type == "cuda":
                replay = CudaRecorder(device)(evaluate, arguments)[0]
            else:
                replay()

        def sample() -> list[float]:
            with _noting(clock), torch.no_grad():
                for _ in range(repeats):
                    replay()
                return clock.gaps()

        repeats = 1
        if device.type == "cuda":  # layers are timed at the clocks of a busy device, as stages are
            repeats = max(1, min(20, int(_BUSY_S / max(sum(sample()), 1e-6))))
        return cls(captured.layers.names, sample)

    def times(
        self, rounds: int, *, alone: Callable[[], AbstractContextManager[object]] = nullcontext,
        on_round: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[Timing, ...]:
        """Median and spread of every layer over `rounds` evaluations (fewer if long), after one that does not count."""
        samples: list[list[float]] = []
        with alone():
            if sum(self.sample()) > _LONG_S:
                rounds = min(rounds, FEWEST)
            for done in range(rounds):
                samples.append(self.sample())
                on_round(done + 1, rounds)
        return tuple(summary(list(column)) for column in zip(*samples))


class _noting:
    """While open, marks are noted by this clock."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        _running.append(self._clock)

    def __exit__(self, *_: object) -> None:
        _running.pop()


def _note(index: int) -> None:
    """A mark in a graph that runs operation by operation: its place in the order is enough."""
    _running[-1].note(index)


def _marked(captured: CapturedDenoiser, *, plain: bool) -> StageGraph:
    """The whole graph with a mark behind the last node of every layer; not `plain`: with the token as last input."""
    stage = captured.whole()
    graph: fx.Graph = stage.module.graph
    last: dict[str, fx.Node] = {}
    nodes = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        if node.op == "call_function" and node.name in captured.layer_of:
            last[captured.layer_of[node.name]] = node
    passed: dict[str, list[fx.Node]] = {name: [] for name in captured.layers.names}
    for value in captured.layers.values:
        if value.name in nodes:
            passed[value.producer].append(nodes[value.name])
    token: fx.Node | None = None
    if not plain:
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            token = graph.placeholder(_TOKEN)
    for index, name in enumerate(captured.layers.names, start=1):
        with graph.inserting_after(last[name]):
            if token is None:
                graph.call_function(_note, (index,))
            else:
                after = passed[name] or [last[name]]
                graph.call_function(torch.ops.hybridiff.mark.default, (token, after, index))
    graph.lint()
    stage.module.recompile()
    return replace(stage, values_in=() if plain else (_TOKEN,))

