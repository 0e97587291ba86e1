"""A worker process: `python -m hybridiff_compiler.runtime.worker`, started by `processes.WorkerPool` and nobody else.

It gets a start message and the denoiser's skeleton on standard input, joins the other ranks, and then does what the
driver's orders say until that input closes.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..ir import Plan
from .connect import connect
from .executor import RankExecutor, graphs_for
from .handover import raw_bytes, unpack_skeleton
from .orders import TIMING, TRACING, Order, OrderInbox
from .processes import FAILED, JOINED, READY, TIMED, TRACED, read_frame
from .settings import NumericSettings
from .trace import RankTrace
from .transport import PeerError

__all__ = ["die_with", "exit_at_end_of_input", "main"]

_STDIN = 0
_PR_SET_PDEATHSIG = 1


class _Worker:
    """One rank serving orders."""

    def __init__(self, rank: int, start: dict[str, Any], skeleton: bytes, store: dist.Store) -> None:
        self.step: int | None = None
        self._rank, self._start, self._skeleton, self._store = rank, start, skeleton, store
        self._generation = -1
        self._trace: RankTrace | None = None

    @torch.no_grad()
    def serve(self) -> None:
        """Take the weights, build the graphs, and run orders for ever."""
        plan = Plan.parse(self._start["plan"], source="plan from the driver")
        device = torch.device(self._start["devices"][self._rank])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        denoiser, tensors = unpack_skeleton(self._skeleton, device)
        self._store.set(f"{JOINED}/{self._rank}", "")
        transport = connect(self._store, self._rank, plan.world_size, timeout_s=None, device=device)
        transport.broadcast([raw_bytes(tensor) for tensor in tensors if tensor.numel()])
        backend = self._start["backend"]
        executor = RankExecutor(
            plan, denoiser, graphs_for(plan, denoiser, backend), rank=self._rank, transport=transport, backend=backend
        )
        executor.prepare()
        inbox = OrderInbox(transport, plan.model.signature)
        self._store.set(f"{READY}/{self._rank}", "")
        names = [pattern.name for pattern in plan.patterns]
        while True:
            self._follow(inbox.receive(), executor, inbox, names)

    def _follow(self, order: Order, executor: RankExecutor, inbox: OrderInbox, names: list[str]) -> None:
        if order.step == TIMING and order.pattern is not None:
            seconds = executor.stage_seconds(names[order.pattern])
            self._store.set(f"{TIMED}/{order.following}/{self._rank}", str(seconds))
            return
        if order.step == TRACING:
            self._follow_trace(order)
            return
        self.step = order.step
        if order.generation != self._generation:
            self._generation = order.generation
            executor.reset()
        for pattern in order.missed:
            executor.skip(names[pattern])
        if order.pattern is not None:
            following = None if order.following is None else names[order.following]
            executor.run(names[order.pattern], following, inbox.inputs)

    def _follow_trace(self, order: Order) -> None:
        done = f"{TRACED}/{order.following}/{self._rank}"
        if order.pattern == 0:
            self._trace = RankTrace(torch.device(self._start["devices"][self._rank]))
            self._trace.start()
            self._store.set(f"{done}/started", "")
        elif self._trace is not None:
            trace, self._trace = self._trace, None
            trace.stop(self._store.get(f"{TRACED}/{order.following}").decode() + f"/{self._rank}.json")
            self._store.set(done, "")


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
    worker = _Worker(arguments.rank, start, skeleton, store)
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


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, where it can (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(0)


if __name__ == "__main__":
    main()
