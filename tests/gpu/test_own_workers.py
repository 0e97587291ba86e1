"""Two GPUs with workers of their own for every test: compiled graphs, failures."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch

from hybridiff_compiler.ir import WorkerError
from hybridiff_compiler.runtime.parallelize import parallelize

from .conftest import GpuModel


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_failing_worker(how: str, model: GpuModel) -> None:
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


def test_compiled_graphs(model: GpuModel, check: Callable[..., None]) -> None:
    tables = {name: model.plan.pattern(name) for name in ("branch", "paper", "branch-reuse")}
    fields = dict(model.plan) | {"patterns": tuple(tables.values())}
    plan = type(model.plan)(**fields).with_steps(("branch", "paper", "paper", "branch-reuse") * 2)
    with parallelize(model.pipe, plan):
        check(model("a red apple"), model.simulate(plan, "a red apple", "inductor"), "compiled")
        check(model("a red apple"), model.simulate(plan, "a red apple", "eager"), "compiled against eager")
