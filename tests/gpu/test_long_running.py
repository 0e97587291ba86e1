"""What a server does: hundreds of generations, interruptions, other sizes, several pipelines in one process."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable

import pytest
import torch

from hybridiff_compiler.quality.measure import loop_timed
from hybridiff_compiler.runtime.intercept import find_denoiser
from hybridiff_compiler.runtime.parallelize import parallelize

from .conftest import GpuModel

STEPS = ("branch", "paper", "pipe", "branch-reuse", "branch", "reuse", "paper", "branch")


class _Stop(Exception):
    pass


def _interrupt(pipeline, step, timestep, tensors):  # type: ignore[no-untyped-def]
    if step == 3:
        pipeline._interrupt = True
    return tensors


def _raise(pipeline, step, timestep, tensors):  # type: ignore[no-untyped-def]
    if step == 3:
        raise _Stop
    return tensors


def test_two_hundred_generations(model: GpuModel) -> None:
    plan = model.plan.with_steps(STEPS)
    with parallelize(model.pipe, plan, backend="eager", timeout_s=20.0):
        first = model("a red apple")
        for _ in range(10):
            model("a red apple")
        torch.cuda.synchronize()
        reserved, allocated, times = torch.cuda.memory_reserved(), torch.cuda.memory_allocated(), []
        for _ in range(200):
            with loop_timed(model.pipe) as seconds:
                last = model("a red apple")
            times.append(seconds())
        assert torch.equal(first, last)
        assert torch.cuda.memory_reserved() == reserved
        del last
        assert torch.cuda.memory_allocated() <= allocated + (1 << 20)
        early, late = statistics.median(times[:50]), statistics.median(times[-50:])
        print(f"200 generations: {early * 1e3:.2f} ms early, {late * 1e3:.2f} ms late")


def test_interruptions_and_other_sizes(model: GpuModel, check: Callable[..., None]) -> None:
    plan = model.plan.with_steps(STEPS)
    expected = model.simulate(plan, "a red apple")
    wide = model("a red apple", height=96, width=96)
    with parallelize(model.pipe, plan, backend="eager", timeout_s=20.0) as opened:
        model("a red apple", callback_on_step_end=_interrupt)
        check(model("a red apple"), expected, "after an interruption")
        with pytest.raises(_Stop):
            model("a red apple", callback_on_step_end=_raise)
        check(model("a red apple"), expected, "after an exception")
        for round_ in range(3):
            said = pytest.warns(UserWarning, match="does not cover") if round_ == 0 else contextlib.nullcontext()
            with said:
                assert torch.equal(model("a red apple", height=96, width=96), wide)
            check(model("a red apple"), expected, "beside another resolution")
        assert opened.executed == STEPS


def test_several_images_at_a_time(model: GpuModel, check: Callable[..., None]) -> None:
    plan = model.plan.with_steps(STEPS)
    expected = model.simulate(plan, "a red apple", num_images_per_prompt=3)
    with parallelize(model.pipe, plan, backend="eager", timeout_s=20.0, batch_sizes=(1, 3)):
        for _ in range(2):
            check(model("a red apple", num_images_per_prompt=3), expected, "three images")
            check(model("a red apple"), model.simulate(plan, "a red apple"), "one image")


def test_two_pipelines_in_one_process(model: GpuModel, check: Callable[..., None]) -> None:
    plan = model.plan.with_steps(STEPS)
    expected = model.simulate(plan, "a red apple")
    other = model._load()
    with (
        parallelize(model.pipe, plan, backend="eager", timeout_s=20.0),
        parallelize(other, plan, backend="eager", timeout_s=20.0),
    ):
        for pipe in (model.pipe, other, model.pipe, other):
            check(model("a red apple", pipe), expected, "one of two pipelines")
    assert find_denoiser(other)[1] is not model.denoiser

