"""Workers that die or hang while the driver's GPU waits for them: one clear error, never a hang.

A hang would be ended by `-o faulthandler_timeout` or by `_at_most`, with the stacks of all threads.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from runtime.tiny import SignatureRecorder, make_plan

from hybridiff_compiler.ir import Plan, WorkerError
from hybridiff_compiler.runtime.intercept import intercept
from hybridiff_compiler.runtime.parallelize import parallelize
from hybridiff_compiler.runtime.waiting import waits_noticed

from .conftest import GpuModel

SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}
TIMEOUT_S = 2.0


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Ends the process, showing where every thread is, when the block takes longer."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _scheduled(model: GpuModel, name: str) -> Iterator[None]:
    before = model.pipe.scheduler
    model.pipe.scheduler = SCHEDULERS[name].from_config(before.config)
    try:
        yield
    finally:
        model.pipe.scheduler = before


def _exact(model: GpuModel) -> Plan:
    """For the present scheduler: some give timesteps as integers, some as fractions."""
    recorder = SignatureRecorder()
    with intercept(model.pipe, recorder):
        model("a red apple")
    return make_plan(
        model.denoiser, recorder.signature, ("branch",) * 8, tables=(("branch", "u0@0 c0@1 | cfg", "whole"),),
        device="cuda",
    )


@pytest.mark.one_gpu
def test_torch_tells_that_ddim_waits_and_euler_does_not() -> None:
    for name, waits in (("ddim", True), ("euler", False)):
        scheduler = SCHEDULERS[name]()
        scheduler.set_timesteps(8, device="cuda")
        latents = torch.zeros(1, 4, 8, 8, device="cuda")
        for timestep in scheduler.timesteps[:3]:
            with waits_noticed() as waited:
                latents = scheduler.step(latents, timestep, latents, return_dict=False)[0]
        assert waited() is waits, name


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_failing_worker(how: str, scheduler: str, model: GpuModel) -> None:
    with _scheduled(model, scheduler):
        plain, exact = model("a red apple"), _exact(model)
        with _at_most(90), parallelize(model.pipe, exact, backend="eager", timeout_s=TIMEOUT_S) as opened:
            model("a red apple")
            assert opened.executed == ("branch",) * 8
            (pid,) = opened.worker_pids

            def strike(pipeline, step, timestep, tensors):  # type: ignore[no-untyped-def]
                if step == 3:
                    os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
                return tensors

            begin = time.monotonic()
            with pytest.raises(WorkerError, match="SIGKILL" if how == "killed" else "did not answer"):
                model("a red apple", callback_on_step_end=strike)
            print(f"{scheduler}, {how}: noticed within {time.monotonic() - begin:.1f} s")
            assert not opened.is_open
        assert torch.equal(model("a red apple"), plain), "the pipeline runs on one device again"


def test_worker_hangs_while_the_host_waits_with_the_lock_held(model: GpuModel) -> None:
    """A callback waits for the GPU and lets no other Python thread run: only torch's own thread can end that."""
    table = torch.arange(4)

    with (
        _scheduled(model, "euler"), _at_most(120),
        parallelize(model.pipe, _exact(model), backend="eager", timeout_s=1.0) as opened,
    ):
        model("a red apple")
        assert opened.executed == ("branch",) * 8
        (pid,) = opened.worker_pids

        def strike(pipeline, step, timestep, tensors):  # type: ignore[no-untyped-def]
            if step == 3:
                os.kill(pid, signal.SIGSTOP)
            table[torch.zeros((), dtype=torch.long, device="cuda")]
            return tensors

        begin = time.monotonic()
        with pytest.raises(WorkerError, match="rank 1"):
            model("a red apple", callback_on_step_end=strike)
        print(f"lock held: noticed within {time.monotonic() - begin:.1f} s")
        assert not opened.is_open
