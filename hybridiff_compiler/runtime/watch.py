"""Noticing that GPUs no longer get on, although the host never waits for them within a step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from .processes import Pool
from .transport import PeerError

__all__ = ["AHEAD", "DeviceWatch", "Mark", "Transfers"]

AHEAD = 4
"""Steps that the host may queue before the device has done the first of them: enough to hide what the host does, few
enough to tell from the time a step has been queued for whether it hangs."""

_PERIOD_S = 0.05
_POLL_S = 20e-6


class Mark(Protocol):
    """A place in the device's queue."""

    def record(self) -> None:
        """It is here now."""

    def query(self) -> bool:
        """Whether the device has passed it."""


class _StreamMark:
    """A mark in a CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._event = device, torch.cuda.Event()

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def query(self) -> bool:
        return self._event.query()


class Transfers(Protocol):
    """The transport, as far as it is watched."""

    @property
    def timeout_s(self) -> float | None:
        """How long a step may take."""

    def abort(self) -> None:
        """Make every transfer end."""

    def is_broken(self) -> bool:
        """Whether transfers were broken off by anybody, so that what they brought is undefined."""

    def silent_peers(self) -> Sequence[int]:
        """Ranks from which something has not arrived."""


class DeviceWatch:
    """A thread that breaks the transfers off when a worker is gone or a step takes longer than the time limit.

    Without it a transfer whose sender died would keep the driver's GPU, and whoever waits for it, for ever. The
    methods are for the driver's thread; where they wait, other threads run.
    """

    def __init__(
        self, pool: Pool, transport: Transfers, device: torch.device, *, new_mark: Callable[[], Mark] | None = None
    ) -> None:
        """
        Args:
            pool: the workers.
            transport: the transfers between them and this process.
            device: this process's.
            new_mark: makes marks for the queue in which steps run; default: the current CUDA stream of `device`.
        """
        self._pool, self._transport, self._device = pool, transport, device
        self._new_mark = new_mark or (lambda: _StreamMark(device))
        self._lock = threading.Lock()
        self._marks: deque[Mark] = deque()
        self._spare: list[Mark] = []
        self._progress = time.monotonic()
        self._error: PeerError | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hybridiff-watch", daemon=True)
        self._thread.start()

    def admit(self) -> None:
        """Wait until another step may be queued.

        Raises:
            PeerError: see `check`.
        """
        self.check()
        while self._unfinished() >= AHEAD:
            time.sleep(_POLL_S)
            self.check()

    def mark(self) -> None:
        """A step's work has been queued."""
        mark = self._spare.pop() if self._spare else self._new_mark()
        mark.record()
        with self._lock:
            if not self._marks:
                self._progress = time.monotonic()
            self._marks.append(mark)

    def check(self) -> None:
        """
        Raises:
            PeerError: a worker is gone or silent; what the device holds since then is undefined.
        """
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Wait until every marked step has been computed.

        Raises:
            PeerError: see `check`.
        """
        while self._error is None and self._unfinished():
            time.sleep(0)
        self.check()

    def finish(self) -> None:
        """`drain` at the end of a generation, when no later transfer would fail because an earlier one has.

        Raises:
            PeerError: see `check`.
        """
        self.drain()
        if self._transport.is_broken():
            self._error = self._overdue()
            raise self._error

    def explain(self, error: PeerError) -> PeerError:
        """The reason for `error`, if there is a better one: transfers fail on this side once one was broken off."""
        if self._error is not None:
            return self._error
        return self._overdue() if self._transport.is_broken() else error

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _unfinished(self) -> int:
        """Steps that the device has not done yet."""
        with self._lock:
            while self._marks and self._marks[0].query():
                self._spare.append(self._marks.popleft())
                self._progress = time.monotonic()
            return len(self._marks)

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while not self._closed.wait(_PERIOD_S):
            gone = self._pool.first_gone()
            if gone is not None:
                self._give_up(PeerError(gone, "computing with", False, "its process ended"))
                return
            limit = self._transport.timeout_s
            if self._unfinished() and limit is not None and time.monotonic() - self._progress > limit:
                self._give_up(self._overdue())
                return

    def _overdue(self) -> PeerError:
        cause = f"no step was finished within {self._transport.timeout_s:g} s"
        silent = tuple(self._transport.silent_peers()) or (1,)
        return PeerError(silent[0], "computing with", True, cause, silent=silent)

    def _give_up(self, error: PeerError) -> None:
        self._error = error
        self._transport.abort()
