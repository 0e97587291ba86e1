"""What every worker process does around its work: it dies with its driver, and tells why it failed."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .processes import FAILED, die_with, read_frame
from .transport import PeerError

__all__ = ["run_worker"]

_STDIN = 0

Serve = Callable[[int, dict[str, Any], Sequence[bytes], dist.Store], None]
"""Does the work: rank, start message, further frames, store. It is stopped when standard input closes."""


def run_worker(serve: Serve, *, frames: int = 0, step: Callable[[], int | None] = lambda: None) -> None:
    """Entry point of a worker process that `processes.WorkerPool` started.

    Args:
        serve: the work.
        frames: messages on standard input after the start message.
        step: the denoising step it is at, for the report of a failure.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--parent", type=int)
    arguments = parser.parse_args()
    if arguments.parent is not None:
        die_with(arguments.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        start = json.loads(read_frame(_STDIN))
        further = [read_frame(_STDIN) for _ in range(frames)]
    except EOFError:
        return
    end_of_input = threading.Thread(target=_exit_at_end_of_input, daemon=True)
    end_of_input.start()
    store = dist.TCPStore(
        start["host"], start["port"], is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
    try:
        serve(arguments.rank, start, further, store)
        end_of_input.join()
    except BaseException as error:
        report = {
            "step": step(), "peer": isinstance(error, PeerError),
            "error": f"{type(error).__name__}: {error}".splitlines()[0], "traceback": traceback.format_exc(),
        }
        store.set(f"{FAILED}/{arguments.rank}", json.dumps(report))
        sys.stderr.flush()
        os._exit(1)  # connections to peers may be stuck; nothing is left to tidy up


def _exit_at_end_of_input() -> None:
    """End this process, whatever it is doing, when its standard input closes."""
    while os.read(_STDIN, 4096):
        pass
    os._exit(0)
