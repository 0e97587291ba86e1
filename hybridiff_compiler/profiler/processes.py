"""A helper process that answers requests: frames to its standard input, frames from its standard output."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from typing import Any

from ..ir import UsageError
from ..runtime.ahead import own_cores
from ..runtime.processes import import_path, read_frame, working_directory, write_frame

__all__ = ["Process", "check_count"]

_TAIL_BYTES = 2000
_MOST_PER_CORE = 4


def check_count(name: str, count: int) -> None:
    """
    Args:
        name: what the caller calls the number.
        count: of processes, each of which takes a few hundred MiB.

    Raises:
        UsageError: it is negative, or would only exhaust this machine.
    """
    most = max(8, _MOST_PER_CORE * own_cores())
    if not 0 <= count <= most:
        raise UsageError(f"got {name}={count}; on this machine of {own_cores()} cores it must be between 0 and {most}")


class Process:
    """`python -m MODULE`, which ends when its standard input does."""

    def __init__(self, module: str, threads: int | None = None) -> None:
        """
        Args:
            module: what to run.
            threads: of its OpenMP; None: as in this process.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            bufsize=0, cwd=working_directory(), env=os.environ | {"PYTHONPATH": import_path()}
            | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
        )

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def signal(self, number: Any) -> None:
        """Send a signal, if it still runs."""
        with contextlib.suppress(OSError):
            self._process.send_signal(number)

    def write(self, data: bytes) -> None:
        """Send one frame."""
        assert self._process.stdin is not None
        write_frame(self._process.stdin, data)

    def ask(self, request: bytes) -> bytes:
        """Send a frame and wait for the answer.

        Raises:
            OSError: the process is gone; says why.
        """
        assert self._process.stdout is not None
        try:
            self.write(request)
            return read_frame(self._process.stdout.fileno())
        except (OSError, EOFError, ValueError) as error:
            raise OSError(self._tail() or str(error)) from error

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def _tail(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            size = os.fstat(self._log.fileno()).st_size
            data = os.pread(self._log.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES))
            return data.decode(errors="replace").strip()
        return ""
