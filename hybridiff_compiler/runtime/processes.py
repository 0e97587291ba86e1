"""Worker processes: starting them, noticing that one failed, saying why, and leaving none behind.

A worker lives as long as its standard input: that pipe is closed when the driver closes the plan, exits, or is killed,
whatever either side is doing at that moment. Workers run in a session of their own, so Ctrl-C reaches the driver
alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import IO, Any, Protocol

import torch.distributed as dist

from ..backends.unpacking import remove_unpacked
from ..ir import WorkerError

__all__ = [
    "FAILED", "HELD", "JOINED", "READY", "REPORTED", "RESIZED", "TIMED", "TRACED", "Pool", "WorkerPool", "await_answer",
    "die_with", "import_path", "is_forked", "open_store", "read_frame", "wait_until_set",
    "working_directory", "write_frame",
]

class Pool(Protocol):
    """The ranks other than the driver, as it sees them: child processes (`WorkerPool`) or what torchrun started."""

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, from rank 1 on, where they are known."""

    def first_gone(self) -> int | None:
        """The lowest rank that has ended, if any; may be asked from any thread."""

    def send_frame(self, rank: int, data: bytes) -> None:
        """Give a rank its next start message."""

    def wait_for(self, key: str, *, timeout_s: float) -> None:
        """Wait until every rank has set `key/rank` in the store."""

    def tell(self, key: str, value: str) -> None:
        """Set `key` in the store."""

    def answer(self, key: str) -> str:
        """What a rank has set `key` in the store to, waiting for it.

        Raises:
            WorkerError: a rank has ended.
        """

    def failure(
        self, doing: str, *, silent: Sequence[int] = (), timeout_s: float = 0.0, suspect: int | None = None
    ) -> WorkerError:
        """The one error that says what went wrong."""

    def close(self) -> None:
        """End all of them; may be called again, from any thread."""


JOINED, READY, FAILED, RESIZED = "joined", "ready", "failed", "resized"
TIMED, TRACED, REPORTED, HELD = "timed", "traced", "reported", "held"
"""Keys, followed by `/rank`, that workers set in the store."""

_PR_SET_PDEATHSIG = 1
_FRAME = struct.Struct("<q")
_GRACE_S = 2.0
_STACK_S = 0.5
_TAIL_BYTES = 6000


def open_store() -> dist.TCPStore:
    """A store served by this process on a free port of the loopback interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        # The store takes the listening socket over: no other process can take the port in between.
        return dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30),
            master_listen_fd=listener.detach(),
        )


def read_frame(descriptor: int) -> bytes:
    """One frame that `write_frame` wrote.

    Raises:
        EOFError: the driver is gone.
    """
    (length,) = _FRAME.unpack(_read_exactly(descriptor, _FRAME.size))
    return _read_exactly(descriptor, length)


def write_frame(stream: Any, data: bytes) -> None:
    """Write one frame to an unbuffered binary stream; raises OSError when nobody reads it."""
    for part in (_FRAME.pack(len(data)), data):
        view = memoryview(part)
        while view:
            view = view[stream.write(view):]


def is_forked(owner: int, *kept: object) -> bool:
    """Whether this is another process than `owner`: a child that was forked later.

    Nothing of the parent's may be ended there. `kept` is then kept for ever: destructors would wait for threads that
    only the parent has.
    """
    if os.getpid() == owner:
        return False
    for thing in kept:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    return True


def import_path() -> str:
    """`PYTHONPATH` with which another process finds the modules that this one does, and no others.

    Start it with `-P`: `-m` would put the working directory first, whatever lies there.
    """
    entries = []
    for entry in sys.path:
        with contextlib.suppress(OSError):  # the working directory was deleted, so nothing is found there
            entries.append(os.path.abspath(entry))
    return os.pathsep.join(entries)


def working_directory() -> str | None:
    """Where to start another process: None for here; another place if this directory was deleted (MKL needs one)."""
    try:
        os.getcwd()
    except OSError:
        return tempfile.gettempdir()
    return None


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, where it can (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(0)


def _read_exactly(descriptor: int, length: int) -> bytes:
    chunks = []
    while length:
        chunk = os.read(descriptor, min(length, 1 << 20))
        if not chunk:
            raise EOFError("the driver closed the pipe")
        chunks.append(chunk)
        length -= len(chunk)
    return b"".join(chunks)


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    """What it writes to standard output and error."""


def wait_until_set(pool: Pool, store: dist.Store, key: str, ranks: Sequence[int], *, timeout_s: float) -> None:
    """Wait until each of `ranks` has set `key/rank` in the store.

    Raises:
        WorkerError: a rank of `pool` has ended, or the time is over.
    """
    deadline = time.monotonic() + timeout_s
    waiting = list(ranks)
    while waiting:
        waiting = [rank for rank in waiting if not store.check([f"{key}/{rank}"])]
        if pool.first_gone() is not None:
            raise pool.failure("starting")
        if waiting and time.monotonic() > deadline:
            raise pool.failure("starting", silent=waiting, timeout_s=timeout_s)
        time.sleep(0.01)


def await_answer(pool: Pool, store: dist.Store, key: str) -> str:
    """What `key` is set to in the store, however long that takes.

    Raises:
        WorkerError: a rank of `pool` has ended.
    """
    while not store.check([key]):
        if pool.first_gone() is not None:
            raise pool.failure("answering a question")
        time.sleep(0.002)
    return store.get(key).decode()


class WorkerPool:
    """The workers of one plan."""

    def __init__(
        self, world_size: int, store: dist.TCPStore, *, threads: int, environment: Mapping[str, str] | None = None,
        module: str = "hybridiff_compiler.runtime.worker",
    ) -> None:
        """Starts ranks 1 to `world_size - 1` as `python -m module`, each with `threads` threads and the variables of
        `environment`."""
        self._store, self._owner = store, os.getpid()
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        # Linux kills such a child when the *thread* that started it ends: for the main thread that is the process.
        tied = threading.current_thread() is threading.main_thread()
        variables = os.environ | dict(environment or {}) | {
            "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
            "PYTHONPATH": import_path(),
        }
        try:
            for rank in range(1, world_size):
                output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the pool
                command = [sys.executable, "-P", "-m", module, f"--rank={rank}"]
                command += [f"--parent={os.getpid()}"] if tied else []
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=variables,
                    start_new_session=True, bufsize=0, cwd=working_directory(),
                )
                self._workers.append(_Worker(rank, process, output))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, from rank 1 on."""
        return tuple(worker.process.pid for worker in self._workers)

    def first_gone(self) -> int | None:
        """The lowest rank whose process has ended, if any; may be asked from any thread."""
        return next((worker.rank for worker in self._workers if worker.process.poll() is not None), None)

    def send_frame(self, rank: int, data: bytes) -> None:
        """Write one frame to a worker's standard input.

        Raises:
            WorkerError: the worker is gone.
        """
        stdin = self._workers[rank - 1].process.stdin
        assert stdin is not None
        try:
            write_frame(stdin, data)
        except OSError as error:
            raise self.failure("starting") from error

    def wait_for(self, key: str, *, timeout_s: float) -> None:
        """Wait until every worker has set `key/rank` in the store.

        Raises:
            WorkerError: a worker failed, or the time is over.
        """
        wait_until_set(self, self._store, key, [worker.rank for worker in self._workers], timeout_s=timeout_s)

    def tell(self, key: str, value: str) -> None:
        """Set `key` in the store."""
        self._store.set(key, value)

    def answer(self, key: str) -> str:
        """See `Pool`."""
        return await_answer(self, self._store, key)

    def failure(
        self, doing: str, *, silent: Sequence[int] = (), timeout_s: float = 0.0, suspect: int | None = None
    ) -> WorkerError:
        """The one error that says what went wrong.

        Args:
            doing: what the driver was doing, e.g. `step 12 (branch)`.
            silent: ranks that did not answer within `timeout_s`; empty when a connection broke instead.
            timeout_s: the limit that was hit.
            suspect: the rank whose connection broke.
        """
        if silent and not any(self._has_failed(worker) for worker in self._workers):
            stacks = "\n".join(self._stack(self._workers[rank - 1]) for rank in silent)
            ranks = ", ".join(map(str, silent))
            return WorkerError(
                f"rank {ranks} did not answer within {timeout_s:g} s during {doing}; if a step may take longer, raise "
                f"timeout_s. Where it was:\n{stacks}"
            )
        # One failure makes the others lose their peers: wait a moment for whoever failed by itself.
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and not any(self._failed_by_itself(worker) for worker in self._workers):
            time.sleep(0.01)
        by_itself = [worker for worker in self._workers if self._failed_by_itself(worker)]
        failed = by_itself or [worker for worker in self._workers if self._has_failed(worker)]
        if not failed:
            return WorkerError(f"the connection to rank {suspect} broke during {doing}, though its process still runs")
        return WorkerError(f"rank {failed[0].rank} {self._cause(failed[0], doing)}")

    def close(self) -> None:
        """End all workers; may be called again, from any thread."""
        if is_forked(self._owner, self._store):
            return
        with self._lock:
            workers, self._workers = self._workers, []
        for worker in workers:
            with contextlib.suppress(OSError):
                worker.process.stdin.close()  # type: ignore[union-attr]
        deadline = time.monotonic() + _GRACE_S
        for worker in workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.output.close()
            remove_unpacked(worker.process.pid)

    def _report(self, worker: _Worker) -> dict[str, Any] | None:
        key = f"{FAILED}/{worker.rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _has_failed(self, worker: _Worker) -> bool:
        return worker.process.poll() is not None or self._report(worker) is not None

    def _failed_by_itself(self, worker: _Worker) -> bool:
        report = self._report(worker)
        return worker.process.poll() is not None if report is None else not report["peer"]

    def _cause(self, worker: _Worker, doing: str) -> str:
        report = self._report(worker)
        if report is not None:
            where = doing if report["step"] is None else f"step {report['step']}"
            return f"failed during {where}: {report['error']}\n{report['traceback']}"
        code = worker.process.poll()
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (out of memory?)" if code == -signal.SIGKILL else ""
        else:
            how = f"exited with code {code}"
        tail = self._tail(worker)
        return f"{how} during {doing}" + (f"; its last output:\n{tail}" if tail else "")

    def _stack(self, worker: _Worker) -> str:
        """Where a silent worker is, as its own fault handler tells."""
        start = os.fstat(worker.output.fileno()).st_size
        if hasattr(signal, "SIGUSR1") and worker.process.poll() is None:
            worker.process.send_signal(signal.SIGUSR1)
            time.sleep(_STACK_S)
        stack = self._tail(worker, start)
        return f"rank {worker.rank}: " + (stack or "(the process does not react)")

    def _tail(self, worker: _Worker, start: int = 0) -> str:
        size = os.fstat(worker.output.fileno()).st_size
        data = os.pread(worker.output.fileno(), _TAIL_BYTES, max(start, size - _TAIL_BYTES))
        return data.decode(errors="replace").strip()
