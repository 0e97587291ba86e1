"""A worker process: `python -m hybridiff_compiler.runtime.worker`, started by `processes.WorkerPool` and nobody else.

It gets a start message and the denoiser's skeleton on standard input, joins the other ranks, and then does what the
driver's orders say until that input closes.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from .processes import FAILED, die_with, read_frame
from .serving import Server
from .settings import NumericSettings
from .transport import PeerError

__all__ = ["exit_at_end_of_input", "main"]

_STDIN = 0


def main() -> None:
    """Entry point of the process."""
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
        start, skeleton = json.loads(read_frame(_STDIN)), read_frame(_STDIN)
    except EOFError:
        return
    threading.Thread(target=exit_at_end_of_input, daemon=True).start()
    NumericSettings(**start["settings"]).apply()
    torch.set_num_interop_threads(1)
    store = dist.TCPStore(
        start["host"], start["port"], is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
    worker = Server(arguments.rank, start, skeleton, store)
    try:
        worker.serve()
    except BaseException as error:
        report = {
            "step": worker.step, "peer": isinstance(error, PeerError),
            "error": f"{type(error).__name__}: {error}".splitlines()[0], "traceback": traceback.format_exc(),
        }
        store.set(f"{FAILED}/{arguments.rank}", json.dumps(report))
        sys.stderr.flush()
        os._exit(1)  # connections to peers may be stuck; nothing is left to tidy up


def exit_at_end_of_input() -> None:
    """End this process, whatever it is doing, when its standard input closes (run it in a thread)."""
    while os.read(_STDIN, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
