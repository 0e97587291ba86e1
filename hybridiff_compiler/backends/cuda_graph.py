"""Replay of a stage graph on static buffers: a CUDA graph, or a plain call that behaves like one.

A CUDA graph reads and writes fixed memory. So a stage is recorded once over input buffers of its own; a call copies the
arguments into them, replays, and returns the recorded outputs, which the next call overwrites. `record_plainly` gives
any callable the same manners, so that whoever handles such outputs can be tested without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .hoisting import Hoisted
from .kept import Moment, RecordedOnce, RecordedTimes, memory_key

__all__ = ["CudaRecorder", "Recorder", "Replay", "record_plainly", "recorder_for", "seconds_per_call"]

_WARM_UP_CALLS = 3


class Recorder(Protocol):
    """Makes a callable repeatable on fixed memory."""

    def __call__(
        self, call: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """A function that evaluates `call(*inputs)` anew, and the tensors in which it leaves the results."""


class CudaRecorder:
    """Records CUDA graphs that share one memory pool.

    Sharing is safe because whoever replays them does so one after the other on one stream and copies the outputs away
    before the next replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None  # one for all graphs: libraries keep a workspace per stream

    def __call__(
        self, call: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """See `Recorder`; compiles and warms up on a side stream first."""
        with torch.cuda.device(self._device), torch.no_grad():
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._stream = torch.cuda.Stream(self._device)
            stream = self._stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_CALLS):
                    call(*inputs)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: the communication library's own threads query events, which must not break a capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                outputs = call(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
        return graph.replay, outputs


def record_plainly(
    call: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """A `Recorder` for any device: evaluates `call` at every replay and overwrites the same outputs."""
    with torch.inference_mode(False), torch.no_grad():  # leaving inference mode switches gradients on
        outputs = [result.clone() for result in call(*inputs)]

    def replay() -> None:
        for output, result in zip(outputs, call(*inputs), strict=True):
            output.copy_(result)

    return replay, outputs


def recorder_for(device: torch.device) -> Recorder | None:
    """What stage graphs on `device` are recorded with: CUDA graphs on CUDA, nothing elsewhere."""
    return CudaRecorder(device) if device.type == "cuda" else None


def seconds_per_call(run: Callable[[], object], device: torch.device, repeats: int, *, warm_up: int = 1) -> float:
    """Time of `run` between CUDA events, or on the wall, after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        run()
    if device.type != "cuda":
        begin_s = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin_s) / repeats
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


class Replay:
    """A recorded stage graph with the calling convention of `StageGraph.module`."""

    def __init__(
        self, call: Callable[..., Sequence[Tensor]], specs: Sequence[tuple[Sequence[int], torch.dtype]],
        device: torch.device, recorder: Recorder,
    ) -> None:
        """
        Args:
            call: the executable; it is called a few times with ones as arguments.
            specs: shape and dtype of every argument.
            device: where it runs.
            recorder: how to record it.
        """
        with torch.inference_mode(False):
            self._inputs = [torch.ones(tuple(shape), dtype=dtype, device=device) for shape, dtype in specs]
        self._seen: dict[int, tuple[object, Tensor]] = {}
        self._call = call  # a graph's kernels read weights that nobody else may be holding on to
        self._once: RecordedOnce | None = None
        self._times: RecordedTimes | None = None
        inputs = list(self._inputs)
        if isinstance(call, Hoisted):
            if call.once is not None:
                self._once = RecordedOnce(call, self._inputs, recorder)
                inputs += self._once.results
            if call.timed is not None:
                self._times = RecordedTimes(call, self._inputs, inputs[len(self._inputs):], recorder)
                inputs += self._times.results
            call = call.each
        self.replay, self._outputs = recorder(call, inputs)

    def __call__(self, *arguments: Tensor, leaves: int = 0, moment: Moment | None = None) -> Sequence[Tensor]:
        """Evaluate on `arguments`, which may live anywhere; the results are valid until the next call.

        The first `leaves` arguments are copied only when they are not the memory that was copied last, unchanged since.
        (Of the others that cannot be told: a transfer writes to a buffer without torch's knowledge.) What was hoisted
        is computed anew when an argument that it depends on is copied; what depends on the timestep, too, is computed
        for many steps at a time if `moment` says which step this is.
        """
        renew = False
        for index, (buffer, argument) in enumerate(zip(self._inputs, arguments, strict=True)):
            if index < leaves:
                key = memory_key(argument)
                if key is not None and index in self._seen and self._seen[index][0] == key:
                    continue
                self._seen[index] = key, argument  # held on to, so that its memory is not handed out again
            buffer.copy_(argument, non_blocking=True)
            renew = renew or (self._once is not None and index in self._once.positions)
        if renew and self._once is not None:
            self._once(arguments)
        if self._times is not None:
            self._times(arguments, moment)
        self.replay()
        return self._outputs

    def forget(self) -> None:
        """Take nothing for unchanged at the next call: weights may have been written to."""
        self._seen.clear()
        if self._once is not None:
            self._once.forget()
        if self._times is not None:
            self._times.forget()
