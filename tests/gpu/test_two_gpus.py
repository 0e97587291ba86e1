"""Driver and worker on two GPUs against the simulator on one."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runtime.tiny import TWO_RANKS, adaptive

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


def test_a_trace_shows_both_gpus(model: GpuModel, parallel: ParallelPipeline, tmp_path: Path) -> None:
    parallel.use(model.plan.with_steps(("branch",) * 8))
    plain, target = model("a red apple"), tmp_path / "trace.json.gz"
    with parallel.traced(target):
        assert torch.equal(model("a red apple"), plain)
    events = json.loads(gzip.decompress(target.read_bytes()))["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    spans = [[event["ts"] for event in kernels if event["pid"].startswith(f"rank {rank}")] for rank in range(2)]
    assert all(spans)
    assert max(map(min, spans)) < min(map(max, spans)), "both GPUs compute at the same time, on one axis"
