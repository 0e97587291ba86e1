"""Under torchrun: ranks are there already, on one host or several; rank 0 is the driver, the others serve.

Everything that `processes.WorkerPool` does through pipes goes through torchrun's store here. A rank that fails says
why in the store and ends, upon which torchrun ends the others.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import time
import traceback
from collections.abc import Sequence
from functools import cache
from itertools import count
from typing import NoReturn

import torch
import torch.distributed as dist

from ..ir import Plan, UsageError, WorkerError
from .processes import FAILED, await_answer, wait_until_set
from .serving import Server
from .settings import NumericSettings
from .transport import PeerError

__all__ = ["TorchrunPool", "is_one_host", "neighbour_count", "own_device", "own_rank", "rendezvous", "serve_rank"]

_GRACE_S = 5.0
_POLL_S = 0.02
_CLOSED, _FINISHED = "closed", "finished"
_calls = count()


def own_rank() -> int | None:
    """This process's rank under torchrun, else None."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def own_device(kind: str) -> torch.device:
    """The device of this rank, of the kind that the plan is for."""
    return torch.device("cpu") if kind == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def is_one_host() -> bool:
    """Whether torchrun started all ranks on this host."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def neighbour_count() -> int:
    """Ranks on this host."""
    return int(os.environ["LOCAL_WORLD_SIZE"])


def rendezvous(plan: Plan) -> dist.Store:
    """The driver's store for one call of `parallelize`.

    Raises:
        UsageError: torchrun started another number of ranks than the plan has.
    """
    _check_world(plan)
    base, number = _base_store(), next(_calls)
    if number == 0:
        atexit.register(base.set, _FINISHED, "")
    return _numbered(base, number)


def serve_rank(plan: Plan, rank: int) -> NoReturn:
    """Serve the driver, through one plan after the other, until its process ends; then end this one.

    Raises:
        SystemExit: always; with code 0 when the driver has ended.
        UsageError: torchrun started another number of ranks than the plan has.
    """
    _check_world(plan)
    base = _base_store()
    for number in count():
        store = _numbered(base, number)
        while not store.check([f"frame/{rank}/1"]):
            if base.check([_FINISHED]):
                raise SystemExit(0)
            time.sleep(_POLL_S)
        _serve_plan(store, rank)
    raise AssertionError("the loop above has no end")


def _serve_plan(store: dist.Store, rank: int) -> None:
    """Serve until the driver closes this plan."""
    start = json.loads(store.get(f"frame/{rank}/0"))
    settings = NumericSettings.current()
    NumericSettings(**start["settings"]).apply()
    kind = torch.device(start["devices"][rank]).type
    server = Server(rank, start, store.get(f"frame/{rank}/1"), store, own_device(kind))
    try:
        server.serve()
    except BaseException as error:
        if isinstance(error, PeerError) and _is_set_soon(store, _CLOSED):
            settings.apply()
            return
        report = {
            "step": server.step, "peer": isinstance(error, PeerError),
            "error": f"{type(error).__name__}: {error}".splitlines()[0], "traceback": traceback.format_exc(),
        }
        store.set(f"{FAILED}/{rank}", json.dumps(report))
        raise SystemExit(f"rank {rank} failed: {report['error']}\n{report['traceback']}") from error


def _check_world(plan: Plan) -> None:
    started = int(os.environ["WORLD_SIZE"])
    if started != plan.world_size:
        raise UsageError(
            f"the plan has {plan.world_size} ranks, torchrun started {started} processes; start {plan.world_size} in "
            f"all, or plan again with --gpus {started}"
        )


@cache
def _base_store() -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore("hybridiff", store)


def _numbered(base: dist.Store, number: int) -> dist.Store:
    """A store of its own for the driver's call number `number` of `parallelize`."""
    return dist.PrefixStore(str(number), base)


def _is_set_soon(store: dist.Store, key: str) -> bool:
    deadline = time.monotonic() + _GRACE_S
    with contextlib.suppress(RuntimeError):  # the store may be gone with the driver
        while time.monotonic() < deadline:
            if store.check([key]):
                return True
            time.sleep(_POLL_S)
    return False


class TorchrunPool:
    """The other ranks that torchrun started, as the driver sees them; see `processes.Pool`."""

    def __init__(self, store: dist.Store, world_size: int) -> None:
        self._store, self._ranks = store, range(1, world_size)
        self._frames = dict.fromkeys(self._ranks, 0)
        self._closed = False

    @property
    def pids(self) -> tuple[int, ...]:
        """Not known: they may be on other hosts."""
        return ()

    def first_gone(self) -> int | None:
        """See `Pool`; ranks that could not say that they failed are noticed by torchrun."""
        return next((rank for rank in self._ranks if self._store.check([f"{FAILED}/{rank}"])), None)

    def send_frame(self, rank: int, data: bytes) -> None:
        """See `Pool`."""
        self._store.set(f"frame/{rank}/{self._frames[rank]}", data)  # type: ignore[arg-type]
        self._frames[rank] += 1

    def wait_for(self, key: str, *, timeout_s: float) -> None:
        """See `Pool`."""
        wait_until_set(self, self._store, key, self._ranks, timeout_s=timeout_s)

    def tell(self, key: str, value: str) -> None:
        """See `Pool`."""
        self._store.set(key, value)

    def answer(self, key: str) -> str:
        """See `Pool`."""
        return await_answer(self, self._store, key)

    def failure(
        self, doing: str, *, silent: Sequence[int] = (), timeout_s: float = 0.0, suspect: int | None = None
    ) -> WorkerError:
        """See `Pool`."""
        deadline = time.monotonic() + _GRACE_S
        reports = self._reports()
        while not any(not report["peer"] for _, report in reports) and time.monotonic() < deadline and not silent:
            time.sleep(0.02)
            reports = self._reports()
        reports.sort(key=lambda item: (item[1]["peer"], item[0]))
        if reports:
            rank, report = reports[0]
            where = doing if report["step"] is None else f"step {report['step']}"
            return WorkerError(f"rank {rank} failed during {where}: {report['error']}\n{report['traceback']}")
        if silent:
            ranks = ", ".join(map(str, silent))
            return WorkerError(
                f"rank {ranks} did not answer within {timeout_s:g} s during {doing}; if a step may take longer, raise "
                "timeout_s"
            )
        return WorkerError(f"the connection to rank {suspect} broke during {doing}; torchrun's output may say why")

    def close(self) -> None:
        """See `Pool`."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(RuntimeError):
                self._store.set(_CLOSED, "")

    def _reports(self) -> list[tuple[int, dict]]:
        with contextlib.suppress(RuntimeError):
            return [
                (rank, json.loads(self._store.get(f"{FAILED}/{rank}"))) for rank in self._ranks
                if self._store.check([f"{FAILED}/{rank}"])
            ]
        return []
