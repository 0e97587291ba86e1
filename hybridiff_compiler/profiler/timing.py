"""Timing callables on the device they run on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

__all__ = [
    "FEWEST", "Timing", "host_clock", "pinned_threads", "sample_in_turns", "summary", "take_turns", "time_together",
    "wall_timer",
]

_T = TypeVar("_T")


FEWEST = 5
"""Samples of calls that take long."""
_LONG_S = 10.0
_SAMPLE_S = 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    spread: float
    """Inter-quartile range over the median."""


@contextmanager
def pinned_threads(count: int | None) -> Iterator[None]:
    """Run a block with `count` CPU threads in torch (None: as they are)."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_together(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 9,
    alone: Callable[[], AbstractContextManager[object]] = nullcontext,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> list[Timing]:
    """Time several callables in turns, so that a disturbance of the machine meets all of them alike.

    On CUDA every call is captured as a graph once and its replays are timed with events: that is device time, free
    of launch overhead. On a CPU it is what `host_clock` says.

    Args:
        calls: what to time.
        device: where they run.
        rounds: samples of each; fewer, but at least `FEWEST`, when one round takes long.
        alone: opened around the samples; may wait until nobody else uses the machine.
        on_round: called with (done, rounds).
    """
    timers = [_cuda_timer(call, device) if device.type == "cuda" else wall_timer(call) for call in calls]
    return sample_in_turns(timers, rounds=rounds, alone=alone, on_round=on_round)


def sample_in_turns(
    timers: Sequence[Callable[[], float]],
    *,
    rounds: int,
    alone: Callable[[], AbstractContextManager[object]] = nullcontext,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> list[Timing]:
    """Call functions that return seconds in turns; see `time_together`."""
    return [summary(sample) for sample in take_turns(timers, rounds=rounds, alone=alone, on_round=on_round)]


def take_turns(
    samplers: Sequence[Callable[[], _T]],
    *,
    rounds: int,
    alone: Callable[[], AbstractContextManager[object]] = nullcontext,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[_T]]:
    """What each of the functions returned in `rounds` rounds (fewer where they take long), called in turns."""
    samples: list[list[_T]] = [[] for _ in samplers]
    with alone():
        began, done = time.monotonic(), 0
        while done < rounds:
            for sampler, sample in zip(samplers, samples):
                sample.append(sampler())
            done += 1
            if (time.monotonic() - began) / done * rounds > _LONG_S:
                rounds = max(done, min(rounds, FEWEST))
            on_round(done, rounds)
    return samples


def summary(sample: list[float]) -> Timing:
    """Median and relative inter-quartile range of samples in seconds."""
    median = statistics.median(sample)
    quartiles = statistics.quantiles(sample, n=4) if len(sample) > 1 else [median] * 3
    return Timing(median, (quartiles[2] - quartiles[0]) / median if median else 0.0)


def host_clock() -> Callable[[], float]:
    """A clock in seconds for work that this thread waits for.

    With one torch thread all work is done by this one, whose processor time is wall time on an idle machine and is not
    disturbed by others on a busy one; with more it is wall time.
    """
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def wall_timer(call: Callable[[], object]) -> Callable[[], float]:
    """A function that returns the seconds of one call, after one that does not count."""
    clock = host_clock()
    call()
    begin = clock()
    call()
    once = clock() - begin
    inner = max(1, min(50, int(2e-3 / max(once, 1e-7))))  # short calls are repeated to about 2 ms a sample

    def timer() -> float:
        begin = clock()
        for _ in range(inner):
            call()
        return (clock() - begin) / inner

    return timer


def _cuda_timer(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()

    def timer() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            begin.record()
            for _ in range(repeats):
                graph.replay()
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats

    repeats = 1
    repeats = max(1, min(10, int(_SAMPLE_S / max(timer(), 1e-6))))
    return timer
