"""Noticing that GPUs no longer get on, although the host never waits for them within a step."""

from __future__ import annotations

import threading
import time
from collections import deque

import torch

from .nccl import NcclTransport
from .processes import Pool
from .transport import PeerError

__all__ = ["DeviceWatch"]

_PERIOD_S = 0.05
_POLL_S = 20e-6


class DeviceWatch:
    """A thread that breaks the transfers off when a worker is gone or a step takes longer than the time limit.

    Without it a transfer whose sender died would keep the driver's GPU, and whoever waits for it, for ever.
    """

    def __init__(self, pool: Pool, transport: NcclTransport) -> None:
        self._pool, self._transport = pool, transport
        self._timeout_s = transport.timeout_s
        self._marks: deque[torch.cuda.Event] = deque()
        self._spare: list[torch.cuda.Event] = []
        self._last: torch.cuda.Event | None = None
        self._progress = time.monotonic()
        self._error: PeerError | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hybridiff-watch", daemon=True)
        self._thread.start()

    def mark(self) -> None:
        """A step's work has been queued on the current stream."""
        if not self._marks:
            self._progress = time.monotonic()
        event = self._spare.pop() if self._spare else torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._transport.device))
        self._marks.append(event)
        self._last = event

    def check(self) -> None:
        """
        Raises:
            PeerError: a worker is gone or silent; what the device holds since then is undefined.
        """
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Wait until every marked step has been computed (once per generation, at its end).

        Raises:
            PeerError: see `check`.
        """
        while self._last is not None and self._error is None and not self._last.query():
            time.sleep(_POLL_S)
        self.check()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        torch.cuda.set_device(self._transport.device)
        while not self._closed.wait(_PERIOD_S):
            gone = self._pool.first_gone()
            if gone is not None:
                self._give_up(PeerError(gone, "computing with", False, "its process ended"))
                return
            while self._marks and self._marks[0].query():
                self._spare.append(self._marks.popleft())
                self._progress = time.monotonic()
            overdue = self._timeout_s is not None and time.monotonic() - self._progress > self._timeout_s
            if self._marks and overdue:
                cause = f"no step was finished within {self._timeout_s:g} s"
                self._give_up(PeerError(1, "computing with", True, cause))
                return

    def _give_up(self, error: PeerError) -> None:
        self._error = error
        self._transport.abort()
