"""Several images per call: the same tables at another batch size."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from hybridiff_compiler.ir import UsageError
from hybridiff_compiler.runtime.parallelize import ParallelPipeline, parallelize

from .tiny import FAIL_KILL, TinyPipeline, adaptive, tiny_plan

Simulate = Callable[..., torch.Tensor]
STEPS = ("branch", "paper", "pipe", "branch-reuse", "swapped", "reuse", "moved", "branch")


def test_alternating_batch_sizes(pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate) -> None:
    plan = two_ranks.plan.with_steps(STEPS)
    two_ranks.use(plan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for images in (1, 3, 1, 2, 3, 1):
            assert torch.equal(pipe2(4, images=images), simulate(plan, 4, images=images)), images
            assert two_ranks.executed == STEPS
    said = [str(warning.message) for warning in caught]
    assert sum("building graphs for 3 images" in text for text in said) == 1
    assert not any("one device" in text for text in said)


def test_adaptive_follows_the_whole_batch(
    pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate
) -> None:
    plan = adaptive(two_ranks.plan)
    two_ranks.use(plan)
    assert torch.equal(pipe2(4, images=3), simulate(plan, 4, images=3))
    assert two_ranks.executed.count("paper") == 2


def test_timing_and_prepared_sizes() -> None:
    pipe = TinyPipeline()
    with parallelize(pipe, tiny_plan(pipe), threads=1, batch_sizes=(2, 4)) as parallel, warnings.catch_warnings():
        warnings.simplefilter("error")
        for images in (4, 2):
            assert pipe(0, images=images).shape[0] == images
            assert len(parallel.stage_seconds("branch")) == 2
    with pytest.raises(UsageError, match="batch_sizes"):
        parallelize(pipe, tiny_plan(pipe), batch_sizes=(0,))


def test_a_worker_that_fails_at_another_batch_size() -> None:
    pipe = TinyPipeline()
    plain = pipe(2, images=2)
    with parallelize(pipe, tiny_plan(pipe), threads=1) as parallel:
        with pytest.warns(UserWarning, match="building graphs"), pytest.raises(RuntimeError, match="SIGKILL"):
            pipe(2, images=2, code=FAIL_KILL)
        assert not parallel.is_open
    assert torch.equal(pipe(2, images=2), plain)
