"""A worker that raises, dies or hangs is one clear error; afterwards the plain pipeline works and nobody is left."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import warnings
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hybridiff_compiler.ir import UsageError, WorkerError
from hybridiff_compiler.runtime.parallelize import parallelize
from hybridiff_compiler.runtime.processes import await_answer

from .tiny import FAIL_HANG, FAIL_KILL, FAIL_RAISE, FOUR_RANKS, ONE_RANK, TinyPipeline, tiny_plan


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than an entry waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"of {pids} still running: {[pid for pid in pids if is_running(pid)]}"
        time.sleep(0.02)


def assert_plain(pipe: TinyPipeline) -> None:
    assert "set_timesteps" not in pipe.scheduler.__dict__
    assert torch.equal(pipe(3), TinyPipeline()(3))


def test_worker_killed_between_two_steps() -> None:
    pipe = TinyPipeline()
    with parallelize(pipe, tiny_plan(pipe), threads=1) as parallel:
        pids = parallel.worker_pids
        pipe(1)

        def kill(index: int) -> None:
            if index == 3:
                os.kill(pids[0], signal.SIGKILL)

        start = time.monotonic()
        with pytest.raises(WorkerError, match=r"rank 1 was killed by SIGKILL.* during step [45] \(branch\)"):
            pipe(1, callback=kill)
        assert time.monotonic() - start < 10
        assert not parallel.is_open
        wait_until_gone(pids)
        assert_plain(pipe)
        parallel.close()


def test_worker_killed_before_a_question() -> None:
    pipe = TinyPipeline()
    with parallelize(pipe, tiny_plan(pipe), threads=1) as parallel:
        os.kill(parallel.worker_pids[0], signal.SIGKILL)
        wait_until_gone(parallel.worker_pids)
        with pytest.raises(WorkerError, match="rank 1 was killed by SIGKILL"):
            parallel.peak_bytes()
        for ask in (parallel.peak_bytes, parallel.held_bytes, lambda: parallel.stage_seconds("branch")):
            with pytest.raises(UsageError, match="is closed"):
                ask()
        assert_plain(pipe)


class _Alive:
    """A pool of which nobody has gone."""

    def first_gone(self) -> None:
        """Nobody."""


def test_answers_may_take_longer_than_a_store_waits() -> None:
    """Timing the stages of a large denoiser on CPUs takes minutes."""
    store = dist.HashStore()
    store.set_timeout(timedelta(milliseconds=50))
    timer = threading.Timer(0.3, store.set, ["key", "value"])
    timer.start()
    assert await_answer(_Alive(), store, "key") == "value"  # type: ignore[arg-type]
    timer.join()


def test_worker_raising_sends_its_traceback() -> None:
    pipe = TinyPipeline()
    with parallelize(pipe, tiny_plan(pipe), threads=1) as parallel:
        pids = parallel.worker_pids
        start = time.monotonic()
        with pytest.raises(WorkerError, match="rank 1 failed during step 0: ArithmeticError: tripped") as caught:
            pipe(1, code=FAIL_RAISE)
        assert "Traceback" in str(caught.value)
        assert "tiny.py" in str(caught.value)
        assert time.monotonic() - start < 10
        wait_until_gone(pids)
        assert_plain(pipe)


def test_worker_hanging_is_given_up() -> None:
    pipe = TinyPipeline()
    with parallelize(pipe, tiny_plan(pipe), threads=1, timeout_s=2.0) as parallel:
        pids = parallel.worker_pids
        pipe(1)
        start = time.monotonic()
        with pytest.raises(WorkerError, match="rank 1 did not answer within 2 s during step 0") as caught:
            pipe(1, code=FAIL_HANG)
        assert "trip" in str(caught.value)  # where it hangs
        assert time.monotonic() - start < 12
        wait_until_gone(pids)
        assert_plain(pipe)


def test_the_rank_that_failed_first_is_named() -> None:
    pipe = TinyPipeline()
    steps = "branch chain"
    plan = tiny_plan(pipe, steps, ranks=4, tables=FOUR_RANKS)
    with parallelize(pipe, plan, threads=1) as parallel:
        pids = parallel.worker_pids
        with pytest.raises(WorkerError, match="rank 1 was killed by SIGKILL"):
            pipe(1, code=FAIL_KILL)
        wait_until_gone(pids)
        assert_plain(pipe)


def test_failure_in_the_drivers_own_part_closes() -> None:
    pipe = TinyPipeline()
    tables = (("swapped", "u0@1 c0@0 | cfg", "whole"),)
    with parallelize(pipe, tiny_plan(pipe, "swapped", tables=tables, exact="swapped"), threads=1) as parallel:
        pids = parallel.worker_pids
        with pytest.raises(ArithmeticError, match="tripped"):
            pipe(1, code=FAIL_RAISE)
        assert not parallel.is_open
        wait_until_gone(pids)
        assert_plain(pipe)


def test_worker_that_cannot_start_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = TinyPipeline()
    plan = tiny_plan(pipe)
    (tmp_path / "pydantic.py").write_text("raise ImportError('broken on purpose')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"(?s)rank 1 exited with code 1 during starting.*broken on purpose"):
        parallelize(pipe, plan, threads=1)
    assert time.monotonic() - start < 30
    assert_plain(pipe)


def test_closing_twice_and_threads_restored() -> None:
    pipe = TinyPipeline()
    plan = tiny_plan(pipe)
    torch.set_num_threads(2)
    parallel = parallelize(pipe, plan, threads=1)
    assert torch.get_num_threads() == 1
    pids = parallel.worker_pids
    parallel.close()
    parallel.close()
    assert not parallel.is_open
    assert torch.get_num_threads() == 2
    wait_until_gone(pids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del parallel


def test_threads_that_others_chose_meanwhile_stay() -> None:
    pipe = TinyPipeline()
    plan = tiny_plan(pipe, "single", ranks=1, tables=ONE_RANK, exact="single")
    with parallelize(pipe, plan, threads=2):
        torch.set_num_threads(3)
    assert torch.get_num_threads() == 3


def test_dropping_the_object_closes_and_says_so() -> None:
    pipe = TinyPipeline()
    parallel = parallelize(pipe, tiny_plan(pipe, "single", ranks=1, tables=ONE_RANK, exact="single"), threads=1)
    assert parallel.is_open
    with pytest.warns(UserWarning, match="was dropped"):
        del parallel
    assert_plain(pipe)


def test_nothing_is_held_after_closing() -> None:
    """Neither the graphs, nor through them the denoiser's memory."""
    pipe = TinyPipeline()
    plan = tiny_plan(pipe, "single", ranks=1, tables=ONE_RANK, exact="single")
    with parallelize(pipe, plan, threads=1) as parallel:
        pipe(1)
    denoiser, closed = weakref.ref(pipe.denoiser), weakref.ref(parallel)
    del pipe, parallel
    gc.collect()
    assert (denoiser(), closed()) == (None, None)
