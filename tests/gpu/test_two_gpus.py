"""Driver and worker on two GPUs against the simulator on one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from runtime.tiny import TWO_RANKS, adaptive

from hybridiff_compiler.ir import WorkerError
from hybridiff_compiler.runtime.parallelize import ParallelPipeline, parallelize

from .conftest import GpuModel

NAMES = [name for name, _, _ in TWO_RANKS]


@pytest.fixture(scope="module")
def parallel(model: GpuModel) -> Iterator[ParallelPipeline]:
    with parallelize(model.pipe, model.plan, backend="eager", timeout_s=20.0) as opened:
        yield opened


@pytest.mark.parametrize("name", NAMES)
def test_every_pattern(name: str, model: GpuModel, parallel: ParallelPipeline, check: Callable[..., None]) -> None:
    plan = model.plan.with_steps(("branch", name, name, "swapped", name, "reuse", name, "branch"))
    parallel.use(plan)
    got = model("a red apple")
    assert parallel.executed == plan.schedule.steps
    check(got, model.simulate(plan, "a red apple"), name)


def test_random_schedules(model: GpuModel, parallel: ParallelPipeline, check: Callable[..., None]) -> None:
    rng = random.Random(3)
    for prompt in ("a red apple", "a smiling face") * 4:
        plan = model.plan.with_steps(("branch", *rng.choices(NAMES, k=7)))
        parallel.use(plan)
        check(model(prompt), model.simulate(plan, prompt), str(plan.schedule.steps))


def test_adaptive(model: GpuModel, parallel: ParallelPipeline, check: Callable[..., None]) -> None:
    plan = adaptive(model.plan)
    parallel.use(plan)
    got = model("a red apple")
    assert parallel.executed.count("paper") == 2
    check(got, model.simulate(plan, "a red apple"), "adaptive")


@pytest.mark.parametrize("name", ["branch", "paper", "pipe"])
def test_a_step_waits_for_nothing_and_reserves_nothing(
    name: str, model: GpuModel, parallel: ParallelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel.use(model.plan.with_steps(("branch", *[name] * 7)))
    model("a red apple")
    driver = parallel._driver
    step = driver.step

    def guarded(call):  # type: ignore[no-untyped-def]
        if call.step in (0, call.num_steps - 1):
            return step(call)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(call)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(driver, "step", guarded)
    model("a red apple")
    reserved = torch.cuda.memory_reserved()
    for _ in range(20):
        model("a red apple")
    assert torch.cuda.memory_reserved() == reserved


def test_compiled_graphs(model: GpuModel, parallel: ParallelPipeline, check: Callable[..., None]) -> None:
    parallel.close()
    tables = {name: model.plan.pattern(name) for name in ("branch", "paper", "branch-reuse")}
    fields = dict(model.plan) | {"patterns": tuple(tables.values())}
    plan = type(model.plan)(**fields).with_steps(("branch", "paper", "paper", "branch-reuse") * 2)
    with parallelize(model.pipe, plan):
        check(model("a red apple"), model.simulate(plan, "a red apple", "inductor"), "compiled")
        check(model("a red apple"), model.simulate(plan, "a red apple", "eager"), "compiled against eager")


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_failing_worker(how: str, model: GpuModel, parallel: ParallelPipeline) -> None:
    parallel.close()
    exact = type(model.plan)(**(dict(model.plan) | {"patterns": (model.plan.pattern("branch"),), "partitions": ()}))
    with parallelize(model.pipe, exact, backend="eager", timeout_s=3.0) as opened:
        (pid,) = opened.worker_pids

        def strike(pipeline, step, timestep, tensors):  # type: ignore[no-untyped-def]
            if step == 3:
                os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            return tensors

        begin = time.monotonic()
        with pytest.raises(WorkerError, match="SIGKILL" if how == "killed" else "did not answer"):
            model("a red apple", callback_on_step_end=strike)
        assert time.monotonic() - begin < 15
        assert not opened.is_open
    assert torch.equal(model("a red apple"), model.plain)
