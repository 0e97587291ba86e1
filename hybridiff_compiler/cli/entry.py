"""From arguments to an exit code: 0 ok, 1 failed, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import errno
import gc
import io
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

__all__ = ["collect_rarely", "main", "run_command"]

DEBUG = "HYBRIDIFF_DEBUG"
"""Environment variable: set to 1 to see tracebacks instead of one-line errors."""

INTERRUPTED, TERMINATED = 130, 143


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    signal.signal(signal.SIGTERM, _terminate)
    _usable_streams()
    collect_rarely()
    sys.exit(run_command(sys.argv[1:]))


def _usable_streams() -> None:
    """Characters that a stream's encoding lacks are printed as question marks, and what is printed to a closed stream
    is lost: neither fails the command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def collect_rarely() -> None:
    """Look for garbage less often in this process: while torch, diffusers and transformers are imported, which makes
    objects that stay, a sixth of the time would go into that."""
    gc.set_threshold(100_000, 20, 100)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns:
        The exit code; an error has been reported on stderr as one line.
    """
    try:
        from .app import app

        code = app(args=list(arguments), prog_name="hybridiff", standalone_mode=False)
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            raise
        return _failed(error)
    if code == INTERRUPTED:  # Typer turns the KeyboardInterrupt itself into an exit code
        return _interrupted()
    return code if isinstance(code, int) else 0


def _failed(error: Exception) -> int:
    """Print `error` as one line and return its exit code."""
    code, message = _judge(error)
    if code == INTERRUPTED:
        return _interrupted()
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code


def _judge(error: Exception) -> tuple[int, str]:
    from typer import Abort

    if isinstance(error, Abort):
        return INTERRUPTED, ""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # the option parser's own errors
        context = getattr(error, "ctx", None)
        path = getattr(context, "command_path", "hybridiff") if context is not None else "hybridiff"
        return 2, f"{str(error.format_message()).rstrip('.')} (see '{path} --help')"
    from ..ir import HybridiffError, UsageError

    if isinstance(error, HybridiffError):
        return (2 if isinstance(error, UsageError) else 1), str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return 1, f"{error.filename}: {error.strerror or error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 1, f"{error.strerror}: what the command prints or keeps could not be written; make room and run it again"
    return 1, f"unexpected {type(error).__name__}: {error} (set {DEBUG}=1 for the traceback)"


def _interrupted() -> int:
    sys.stderr.write("interrupted\n")
    return INTERRUPTED


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds like an interrupt, so that worker processes are closed on the way out."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(TERMINATED)
