"""Timing many graphs: in this process, or in several that build them side by side.

A compiler keeps one core busy for minutes per large graph, while timing a graph takes a second but wants the GPU alone.
So with `ProcessTimers` graphs are built by several processes at once, each keeps and times what it has built, and
whoever takes times has the others stopped meanwhile. The processes share the denoiser's weights.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import signal
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import torch.multiprocessing  # registers how tensors are shared
from torch import Tensor, nn

from ..capture import CapturedDenoiser
from ..ir import Branch, CallSignature
from ..runtime.handover import pack_skeleton
from .jobs import GraphBuilder, Job, Sampler
from .processes import Process
from .timing import Timing, summary, take_turns

__all__ = ["Alone", "LocalTimers", "ProcessTimers", "Timers", "share_tensors", "timers_for"]

Alone = Callable[[], AbstractContextManager[object]]
"""Opened around samples; may wait until nobody else uses the machine."""
Progress = Callable[[int, int], None]
Timings = dict[Hashable, tuple[Timing, ...]]
"""Per job: of the segment, or of every layer."""

_WORKER = "hybridiff_compiler.profiler.timer_worker"
_QUIET_S = 0.3
"""After which what a stopped process had queued on a GPU has run out."""
_FIRST_SAMPLES = 3


class Timers(Protocol):
    """Builds and times graphs."""

    ahead: bool
    """Whether graphs are built while this process does something else, so that a guess costs nothing."""

    def start(self, jobs: Mapping[Hashable, Job]) -> None:
        """Have these graphs built."""

    def finish(self, rounds: int, deadline: float, on_progress: Progress) -> Timings:
        """Times of everything started since the last call that was built before `deadline` (of `time.monotonic`)."""

    def undisturbed(self) -> AbstractContextManager[object]:
        """Opened around samples that the caller takes itself."""

    def close(self) -> None:
        """End what was started."""


@contextlib.contextmanager
def timers_for(
    denoiser: nn.Module, signature: CallSignature, inputs: Mapping[Branch, Mapping[str, Tensor]], *, jobs: int = 0,
    threads: int | None = None, alone: Alone = nullcontext, captured: Mapping[int, CapturedDenoiser] | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Iterator[Timers]:
    """Timers in `jobs` processes (0: in this one), ended with the block; see `ProcessTimers`.

    Args:
        captured: graphs of the denoiser by batch, where they are there already; for timers in this process.
    """
    timers: Timers
    if jobs:
        timers = ProcessTimers(
            denoiser, signature, inputs, count=jobs, threads=threads, alone=alone, on_note=on_note
        )
    else:
        timers = LocalTimers(GraphBuilder(denoiser, signature, inputs, captured), alone)
    try:
        yield timers
    finally:
        timers.close()


class LocalTimers:
    """Builds graphs in this process, one after the other."""

    ahead = False

    def __init__(self, builder: GraphBuilder, alone: Alone = nullcontext) -> None:
        self._builder, self._alone = builder, alone
        self._started: dict[Hashable, Job] = {}

    def start(self, jobs: Mapping[Hashable, Job]) -> None:
        """See `Timers`."""
        self._started.update(jobs)

    def finish(self, rounds: int, deadline: float, on_progress: Progress) -> Timings:
        """See `Timers`."""
        jobs, self._started = self._started, {}
        samplers: dict[Hashable, Sampler] = {}
        for done, (key, job) in enumerate(jobs.items()):
            on_progress(done, len(jobs))
            if time.monotonic() < deadline:
                samplers[key] = self._builder.sampler(job)
        on_progress(len(jobs), len(jobs))
        self._builder.forget()
        first = _in_turns(samplers, _FIRST_SAMPLES, self.undisturbed, on_progress)
        times = _in_turns(samplers, rounds, self.undisturbed, on_progress)
        return {key: _with_drift(timings, first[key]) for key, timings in times.items()}

    def undisturbed(self) -> AbstractContextManager[object]:
        """See `Timers`."""
        return self._alone()

    def close(self) -> None:
        """See `Timers`."""


class ProcessTimers:
    """Builds graphs in several processes; close it when done.

    What a process failed at is built by the caller's own process then.
    """

    ahead = True

    def __init__(
        self, denoiser: nn.Module, signature: CallSignature, inputs: Mapping[Branch, Mapping[str, Tensor]],
        *, count: int, threads: int | None = None, alone: Alone = nullcontext,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            denoiser: the network on its device; its memory is shared with the processes from the first `start` on, and
                must not move any more then.
            signature: one branch's call.
            inputs: one call per branch, by leaf path.
            count: processes.
            threads: CPU threads while a process takes times (None: as torch is set).
            alone: see `Alone`; whom it stops must not be these processes.
            on_note: called, from any thread, with what has been built or has failed.
        """
        self._alone, self._note = alone, on_note
        self._began = time.monotonic()
        self._turn = threading.RLock()
        self._changed = threading.Condition()
        self._queue: list[tuple[Hashable, Job]] = []
        self._jobs: dict[Hashable, Job] = {}
        self._local = LocalTimers(GraphBuilder(denoiser, signature, inputs), self.undisturbed)
        self._open: set[Hashable] = set()
        """Started, neither built nor failed."""
        self._place: dict[Hashable, Process] = {}
        self._first: Timings = {}
        """Times taken when a graph had just been built: what there is when its process is busy at the deadline."""
        self._batch: list[Hashable] = []
        """Started since the last `finish`."""
        self._ended = False
        self._settled = threading.Event()
        """Weights may be shared."""
        self._processes: list[Process] = []
        self._busy: set[Process] = set()
        device = next(denoiser.parameters()).device
        skeleton, weights = pack_skeleton(denoiser)
        leaves = [(branch, path, tensor) for branch, side in inputs.items() for path, tensor in side.items()]
        head = {
            "device": str(device), "threads": threads, "signature": signature.model_dump(mode="json"),
            "leaves": [(branch, path) for branch, path, _ in leaves],
        }
        tensors = [*weights, *(tensor for *_, tensor in leaves)]
        for _ in range(count):
            process = Process(_WORKER, threads)
            self._processes.append(process)
            threading.Thread(
                target=self._serve, args=(process, head, skeleton, tensors), daemon=True
            ).start()

    def start(self, jobs: Mapping[Hashable, Job]) -> None:
        """See `Timers`; the first ones first."""
        self._settled.set()
        with self._changed:
            self._queue += jobs.items()
            self._jobs.update(jobs)
            self._open |= set(jobs)
            self._batch += jobs
            self._changed.notify_all()

    def finish(self, rounds: int, deadline: float, on_progress: Progress) -> Timings:
        """See `Timers`."""
        wanted, self._batch = self._batch, []
        with self._changed:
            while self._open and self._alive() and (left := deadline - time.monotonic()) > 0:
                on_progress(len([key for key in wanted if key not in self._open]), len(wanted))
                self._changed.wait(min(left, 5.0))
            self._queue = [(key, job) for key, job in self._queue if key not in wanted]
            self._open -= set(wanted)
            ready = {
                key: self._place[key] for key in wanted if key in self._place and self._place[key] not in self._busy
            }
        on_progress(len(wanted), len(wanted))
        try:
            times = _in_turns(
                {key: _remote(process, key) for key, process in ready.items()}, rounds,
                lambda: self.undisturbed(set(ready.values())), on_progress,
            )
        except OSError as error:
            self._note(f"a process ended while it took times: {error}")
            times = {}
        times = {key: self._first[key] for key in wanted if key in self._first and key not in times} | {
            key: _with_drift(timings, self._first[key]) for key, timings in times.items()
        }
        failed = {key: self._jobs[key] for key in wanted if key not in times}
        if failed and time.monotonic() < deadline:
            self._note(f"built here: {', '.join(map(str, failed))}")
            self._local.start(failed)
            times |= self._local.finish(rounds, deadline, on_progress)
        return times

    @contextlib.contextmanager
    def undisturbed(self, at_work: Sequence[Any] | set[Any] = ()) -> Iterator[None]:
        """See `Timers`; all processes but those `at_work` are stopped."""
        stop, go_on = getattr(signal, "SIGSTOP", None), getattr(signal, "SIGCONT", None)
        with self._turn, self._alone():
            stopped = [p for p in self._processes if p not in at_work and p.running and stop is not None]
            try:
                for process in stopped:
                    process.signal(stop)
                if stopped:
                    time.sleep(_QUIET_S)
                yield
            finally:
                for process in stopped:
                    process.signal(go_on)

    def close(self) -> None:
        """See `Timers`."""
        self._settled.set()
        with self._changed:
            self._ended = True
            self._queue.clear()
            self._changed.notify_all()
        for process in self._processes:
            process.close()

    def _alive(self) -> bool:
        return any(process.running for process in self._processes)

    def _serve(self, process: Process, head: Any, skeleton: bytes, tensors: list[Tensor]) -> None:
        """One process's thread: hand over the denoiser, then job after job."""
        key: Hashable = None
        try:
            process.write(json.dumps(head).encode())
            process.write(skeleton)
            self._settled.wait()
            with self._turn:  # sharing keeps account of references, which is not made for threads
                shared = share_tensors(tensors)
            process.write(shared)
            _ask(process, {"do": "load"})
            while True:
                with self._changed:
                    while not self._queue and not self._ended:
                        self._changed.wait()
                    if self._ended:
                        return
                    key, job = self._queue.pop(0)
                    self._busy.add(process)
                began = time.monotonic()
                _ask(process, {"do": "build", "key": repr(key), "job": job.model_dump(mode="json")})
                took = time.monotonic() - began
                with self.undisturbed({process}):
                    sampler = _remote(process, key)
                    samples = [sampler() for _ in range(_FIRST_SAMPLES)]
                with self._changed:
                    self._first[key] = tuple(summary(list(column)) for column in zip(*samples))
                    self._place[key] = process
                    self._open.discard(key)
                    self._busy.discard(process)
                    self._changed.notify_all()
                self._note(f"{key}: built in {took:.0f} s, {1e3 * sum(map(sum, samples)) / len(samples):.3f} ms")
        except Exception as error:
            if not self._ended:
                self._note(f"a process that builds graphs failed ({key}): {error}")
        finally:
            process.close()
            with self._changed:
                self._open.discard(key)
                if not self._alive():
                    self._open.clear()
                self._changed.notify_all()


def _with_drift(timings: Sequence[Timing], first: Sequence[Timing]) -> tuple[Timing, ...]:
    """Timings whose spread covers the distance to those taken at another moment, too."""
    return tuple(
        replace(timing, spread=max(timing.spread, abs(before.median / timing.median - 1) if timing.median else 0.0))
        for timing, before in zip(timings, first)
    )


def share_tensors(tensors: Sequence[Tensor]) -> bytes:
    """A pickle through which one other process sees the memory of `tensors` (CUDA or CPU) itself.

    On a CPU their memory moves to where processes can share it. Unpickling needs `torch.multiprocessing` imported.
    """
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")  # descriptors cannot travel through a plain pipe
    try:
        stream = io.BytesIO()
        ForkingPickler(stream, pickle.HIGHEST_PROTOCOL).dump([tensor.detach() for tensor in tensors])
        return stream.getvalue()
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def _ask(process: Process, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request.

    Raises:
        OSError: the process is gone, or could not do it.
    """
    answer: dict[str, Any] = json.loads(process.ask(json.dumps(request).encode()))
    if "error" in answer:
        raise OSError(answer["error"])
    return answer


def _remote(process: Process, key: Hashable) -> Sampler:
    return lambda: tuple(_ask(process, {"do": "sample", "key": repr(key)})["seconds"])


def _in_turns(
    samplers: Mapping[Hashable, Sampler], rounds: int, alone: Alone, on_progress: Progress
) -> Timings:
    """Sample all of them in turns, so that a disturbance of the machine meets all alike."""
    if not samplers:
        return {}
    samples = take_turns(list(samplers.values()), rounds=rounds, alone=alone, on_round=on_progress)
    return {
        key: tuple(summary(list(column)) for column in zip(*each)) for key, each in zip(samplers, samples)
    }
