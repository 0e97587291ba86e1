"""Noticing that a device no longer gets on, with marks and transfers made by hand."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from hybridiff_compiler.runtime.transport import PeerError
from hybridiff_compiler.runtime.waiting import WaitingMethod
from hybridiff_compiler.runtime.watch import AHEAD, DeviceWatch


class Mark:
    """Passed when told so."""

    def __init__(self) -> None:
        self.passed = False

    def record(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed


class World:
    """A device, its transfers and the pool of workers in one."""

    def __init__(self, timeout_s: float | None = None) -> None:
        self.timeout_s, self.gone, self.aborted, self.broken = timeout_s, None, threading.Event(), False
        self.marks: list[Mark] = []
        self.watch = DeviceWatch(self, self, torch.device("cpu"), new_mark=self._new_mark)  # type: ignore[arg-type]

    def _new_mark(self) -> Mark:
        self.marks.append(Mark())
        return self.marks[-1]

    def first_gone(self) -> int | None:
        return self.gone

    def abort(self) -> None:
        self.aborted.set()
        self.finish()  # broken transfers let the device get on

    def is_broken(self) -> bool:
        return self.broken

    def silent_peers(self) -> list[int]:
        return [2, 3]

    def finish(self) -> None:
        for mark in self.marks:
            mark.passed = True


@contextmanager
def world(timeout_s: float | None = None) -> Iterator[World]:
    made = World(timeout_s)
    try:
        yield made
    finally:
        made.watch.close()


def later(seconds: float, what: Callable[[], None]) -> None:
    threading.Timer(seconds, what).start()


def test_steps_are_queued_ahead_up_to_a_limit() -> None:
    with world() as own:
        for _ in range(AHEAD):
            own.watch.admit()
            own.watch.mark()
        later(0.05, own.finish)
        own.watch.admit()
        assert own.marks[0].passed, "the device has done a step before the next one was let in"


def test_marks_are_used_again() -> None:
    with world() as own:
        for _ in range(5):
            own.watch.mark()
            own.finish()
            own.watch.drain()
        assert len(own.marks) == 1


def test_a_worker_that_dies_ends_every_wait() -> None:
    with world() as own:
        own.watch.mark()
        own.gone = 1
        with pytest.raises(PeerError, match="rank 1: its process ended") as caught:
            own.watch.drain()
        assert own.aborted.wait(1)
        assert not caught.value.timed_out
        assert own.watch.explain(PeerError(1, "sending to", False, "aborted")) is caught.value
        with pytest.raises(PeerError):
            own.watch.admit()


def test_a_step_that_takes_too_long_names_the_silent_ranks() -> None:
    with world(timeout_s=0.1) as own:
        own.watch.mark()
        with pytest.raises(PeerError, match=r"no step was finished within 0\.1 s") as caught:
            own.watch.drain()
        assert caught.value.silent == (2, 3)


def test_nothing_is_overdue_while_nothing_is_queued() -> None:
    with world(timeout_s=0.05) as own:
        own.watch.mark()
        own.finish()
        own.watch.drain()
        time.sleep(0.2)
        own.watch.check()
        assert not own.aborted.is_set()


def test_transfers_that_torch_broke_off_do_not_pass_for_results() -> None:
    with world(timeout_s=1.0) as own:
        own.watch.mark()
        own.finish()
        own.broken = True
        with pytest.raises(PeerError):
            own.watch.finish()


@contextmanager
def _noticed(waits: bool) -> Iterator[Callable[[], bool]]:
    yield lambda: waits


def test_a_scheduler_that_waits_is_called_when_the_device_is_done() -> None:
    calls: list[str] = []
    method = WaitingMethod(lambda: calls.append("settle"), lambda: _noticed(True))
    step = method.wrap(lambda value: calls.append(value))
    for name in "abcd":
        step(name)
    assert calls == ["settle", "a", "settle", "b", "settle", "c", "settle", "d"]


def test_a_scheduler_that_only_queues_work_is_left_alone() -> None:
    calls: list[str] = []
    method = WaitingMethod(lambda: calls.append("settle"), lambda: _noticed(False))
    step = method.wrap(lambda value: calls.append(value))
    for name in "abcd":
        step(name)
    assert calls == ["settle", "a", "settle", "b", "c", "d"], "two calls find out"


def test_a_wait_with_the_interpreters_lock_held_comes_after_the_watch_has_acted() -> None:
    """What DDIM does on a GPU: no other Python thread runs while it waits."""
    sleep_with_lock = ctypes.PyDLL(None).usleep

    with world() as own:

        def step() -> bool:
            for _ in range(100):
                if own.marks[0].passed:
                    return True
                sleep_with_lock(10_000)
            return False

        guarded = WaitingMethod(own.watch.drain, lambda: _noticed(True)).wrap(step)
        own.watch.mark()
        own.gone = 1
        with pytest.raises(PeerError, match="its process ended"):
            guarded()
        assert own.aborted.wait(1)
