"""Generating images for comparison, and timing it.

Two times are taken. The *denoising loop* runs from the start of the first denoiser call to the end of the last
scheduler step: everything a plan changes and nothing else (text encoders and VAE are outside). The *call* is the whole
pipeline call, images out. On CUDA the loop is timed with events, so nothing is synchronised inside it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir import FixedSchedule, HybridiffError, Pattern, Plan, Predictions, RankSpec
from ..profiler.decode import stack_frames
from ..profiler.generate import Generation
from ..runtime.intercept import find_denoiser, intercept
from ..runtime.segments import SegmentRunner
from ..runtime.simulator import Simulator

__all__ = ["QualityError", "Sample", "generate", "loop_timed", "max_abs_diff", "simulate", "split_batch_plan"]


class QualityError(HybridiffError):
    """Images are not what a plan claims or what was asked for."""


@dataclass(frozen=True)
class Sample:
    """Images of one pipeline call and what it took."""

    images: Tensor
    """[N, 3, H, W] on the CPU, values in [0, 1]; frames of a video one below the other."""
    loop_s: float
    """Denoising loop."""
    call_s: float
    """The whole call."""


def generate(generation: Generation, prompts: Sequence[str], *, first: int = 0) -> Sample:
    """One call of the pipeline as it is now (plain, or running by a plan).

    Args:
        generation: how; prompt k of `prompts` starts from `seed + first + k`.
        prompts: generated together.
        first: index of the first prompt.
    """
    with loop_timed(generation.pipe) as loop_seconds:
        begin = time.perf_counter()
        images = generation.call(prompts, "pt", first).float().cpu()
        if images.dim() == 5:
            images = stack_frames(images)
        call_s = time.perf_counter() - begin
    return Sample(images, loop_seconds(), call_s)


def simulate(
    generation: Generation,
    plan: Plan,
    prompts: Sequence[str],
    *,
    first: int = 0,
    batch: int = 8,
    runners: dict[int, SegmentRunner] | None = None,
    backend: str = "eager",
) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Images of `plan` from the single-device simulator, and the pattern names that each prompt's steps ran.

    Args:
        generation: how.
        plan: the tables.
        prompts: what.
        first: index of the first prompt.
        batch: prompts simulated together; adaptive plans always take one at a time, as each finds its own window.
        runners: see `Simulator`; keep them to reuse captured graphs.
        backend: see `Simulator`.
    """
    _, denoiser = find_denoiser(generation.pipe)
    batch = batch if isinstance(plan.schedule, FixedSchedule) else 1
    simulator = Simulator(plan, denoiser, runners=runners, backend=backend)
    images, executed = [], []
    with intercept(generation.pipe, simulator):
        for start in range(0, len(prompts), batch):
            chunk = prompts[start : start + batch]
            images.append(generate(generation, chunk, first=first + start).images)
            executed += [tuple(simulator.executed)] * len(chunk)
    return torch.cat(images), executed


def split_batch_plan(plan: Plan) -> Plan:
    """The exact reference of `plan`: every step evaluates the two branches one by one (`branch`)."""
    branch = Pattern.parse("branch", "u0@0 c0@1 | cfg")
    ranks = plan.ranks if plan.world_size > 1 else (*plan.ranks, RankSpec(device=plan.ranks[0].device))
    fields = dict(plan)
    return Plan(**(fields | {
        "ranks": ranks, "partitions": (), "patterns": (branch,), "exact": branch.name, "predictions": Predictions(),
        "schedule": FixedSchedule(steps=(branch.name,) * plan.num_steps),
    }))


def max_abs_diff(images: Tensor, reference: Tensor) -> float:
    """Largest difference of a pixel."""
    return float((images - reference).abs().max())


@contextmanager
def loop_timed(pipe: Any) -> Iterator[Callable[[], float]]:
    """Yields a function that tells the seconds of the denoising loop that ran inside the context."""
    _, denoiser = find_denoiser(pipe)
    scheduler, marks = pipe.scheduler, _Marks(next(denoiser.parameters()).device)
    step, hooked = scheduler.step, scheduler.__dict__.get("step")

    @functools.wraps(step)
    def timed_step(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        marks.last = marks.now()
        return result

    def before(module: Any, args: Any) -> None:
        if marks.first is None:
            marks.first = marks.now()

    handle = denoiser.register_forward_pre_hook(before)
    scheduler.step = timed_step
    try:
        yield marks.seconds
    finally:
        handle.remove()
        del scheduler.step
        if hooked is not None:
            scheduler.step = hooked


class _Marks:
    """Begin and end of a loop on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first: Any = None
        self.last: Any = None

    def now(self) -> Any:
        """A moment of the device's work queue."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """From `first` to `last`; 0 when no step ran."""
        if self.first is None or self.last is None:
            return 0.0
        if self.device.type != "cuda":
            return float(self.last - self.first)
        torch.cuda.synchronize(self.device)
        return float(self.first.elapsed_time(self.last)) / 1e3
