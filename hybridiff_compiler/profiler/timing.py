"""Timing callables on the device they run on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Timing", "pinned_threads", "time_together"]


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
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> list[Timing]:
    """Time several callables in turns, so that a disturbance of the machine meets all of them alike.

    On CUDA every call is captured as a graph once and its replays are timed with events: that is device time, free
    of launch overhead. On a CPU it is wall time.
    """
    timers = [_cuda_timer(call, device) if device.type == "cuda" else _wall_timer(call) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    for done in range(rounds):
        for timer, sample in zip(timers, samples):
            sample.append(timer())
        on_round(done + 1, rounds)
    return [_summary(sample) for sample in samples]


def _summary(sample: list[float]) -> Timing:
    median = statistics.median(sample)
    quartiles = statistics.quantiles(sample, n=4) if len(sample) > 1 else [median] * 3
    return Timing(median, (quartiles[2] - quartiles[0]) / median if median else 0.0)


def _wall_timer(call: Callable[[], object]) -> Callable[[], float]:
    call()
    begin = time.perf_counter()
    call()
    once = time.perf_counter() - begin
    inner = max(1, min(50, int(2e-3 / max(once, 1e-7))))  # short calls are repeated to about 2 ms a sample

    def timer() -> float:
        begin = time.perf_counter()
        for _ in range(inner):
            call()
        return (time.perf_counter() - begin) / inner

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
    repeats = 10

    def timer() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            begin.record()
            for _ in range(repeats):
                graph.replay()
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats

    return timer
