"""Transport between GPUs of one host: orders stay on the CPU channel, tensors go by NCCL without the host waiting.

NCCL runs what two ranks exchange over one communicator in one order and blocks the next transfer until both sides have
reached this one. Messages of one direction do come in one order on both sides (inputs, values of the step, values for
the next), but estimates and values back to the driver do not. So there is a communicator, with a stream of its own,
for each direction and one for the estimates. A receive starts when the receiver's earlier work is done, so a waiting
transfer never takes multiprocessors from a running graph.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import combinations
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .transport import Channel, Incoming, PeerError, Transport, allocate
from .watch import AHEAD

__all__ = ["ENVIRONMENT", "NcclTransport"]

ENVIRONMENT: Mapping[str, str] = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",  # NVLink multicast brings nothing here
    # An overdue transfer is broken off by torch's own thread, which kills no process,
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2", "TORCH_NCCL_ENABLE_MONITORING": "0", "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    # at once, instead of waiting a minute for others to write reports,
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
    # nor for Python stacks: a host that waits with the interpreter's lock held would keep it waiting for ever.
    "TORCH_FR_BUFFER_SIZE": "0",
}
"""What NCCL and torch's process groups are made under."""

_FORWARD, _BACKWARD, _ESTIMATES, _WEIGHTS = "forward", "backward", "estimates", "weights"
_ABORT_S = 10.0
_REMEMBERED = 4
"""Receives per rank that are looked at when one is overdue."""
_SUCCESS = 0
"""torch's `WorkResult` of a transfer that was completed."""
_NEVER = timedelta(days=365)


class _StreamWork:
    """A transfer that the current stream, not the host, waits for."""

    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def is_completed(self) -> bool:
        """Whether it is done, or was broken off."""
        return self._work.is_completed()

    def has_failed(self) -> bool:
        """Whether torch has broken it off, as far as it tells."""
        ask = getattr(self._work, "get_future_result", None)
        result = None if ask is None else ask()
        return result is not None and result.done() and result.value() != _SUCCESS

    def wait(self, _timeout: timedelta) -> None:
        self._work.wait()


class NcclTransport(Transport):
    """Messages of one rank over NCCL; `Channel.ORDERS` over gloo as in the base class."""

    posts_early = False

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, *, timeout_s: float | None, device: torch.device,
        one_host: bool = True,
    ) -> None:
        """Connects to all other ranks, which must do the same at the same time.

        Args:
            store, rank, world_size, timeout_s, one_host: see `Transport`.
            device: this rank's GPU; no other rank may have the same.
        """
        super().__init__(store, rank, world_size, timeout_s=timeout_s, one_host=one_host)
        self.device = device
        self._nccl: dict[str, Any] = {}
        with torch.cuda.device(device), _environment(ENVIRONMENT):
            for name in (_FORWARD, _BACKWARD, _ESTIMATES, _WEIGHTS):
                options = dist.ProcessGroupNCCL.Options()
                options.is_high_priority_stream = True
                options._timeout = _NEVER
                prefixed = dist.PrefixStore(f"nccl-{name}", store)
                self._nccl[name] = dist.ProcessGroupNCCL(prefixed, rank, world_size, options)
            try:
                self._connect()
            except RuntimeError as error:
                raise PeerError(0 if rank else 1, "connecting to", False, str(error)) from error
        self._receiving: deque[tuple[int, _StreamWork]] = deque(maxlen=_REMEMBERED * world_size)
        if timeout_s is not None:
            # Steps are queued ahead, and what is received waits for them: only then is a transfer surely stuck.
            limit = timedelta(seconds=(AHEAD + 1) * timeout_s)
            for name in (_FORWARD, _BACKWARD, _ESTIMATES):
                self._nccl[name]._set_default_timeout(limit)

    def broadcast(self, tensors: Sequence[Tensor], *, root: int = 0, window: int = 16) -> None:
        """See `Transport.broadcast`; returns when the tensors have arrived."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        try:
            for tensor in tensors:
                self._nccl[_WEIGHTS].broadcast([tensor.to(self.device)], options).wait()
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise PeerError(root, "broadcasting with", False, str(error)) from error

    def abort(self) -> None:
        """Make every transfer under way end, with undefined contents, on this side; nothing can be sent afterwards.

        All communicators at once: freeing one waits for the device, and so for the transfers of those that were not
        told to stop yet.
        """
        groups, self._nccl = self._nccl, {}
        threads = [threading.Thread(target=group.abort, daemon=True) for group in groups.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_ABORT_S)

    def is_broken(self) -> bool:
        """Whether torch broke transfers off by itself: one was overdue, or NCCL noticed that the other side is gone."""
        return any(work.has_failed() for _, work in tuple(self._receiving))

    def silent_peers(self) -> Sequence[int]:
        """Ranks from which something has not arrived, lowest first."""
        return sorted({peer for peer, work in tuple(self._receiving) if not work.is_completed()})

    def close(self) -> None:
        """Drop the connections; pending transfers fail."""
        self.abort()
        super().close()

    def _allocate(self, nbytes: int) -> Tensor:
        return allocate(nbytes, self.device)

    def send_bytes(self, peer: int, channel: Channel, buffer: Tensor) -> Any:
        """See `Transport.send_bytes`; the transfer follows what the current stream holds now."""
        if channel is Channel.ORDERS:
            return super().send_bytes(peer, channel, buffer)
        self.sent_messages[channel] += 1
        self.sent_bytes[channel] += buffer.numel()
        try:
            return _StreamWork(self._group_of(self.rank, peer, channel).send([buffer], peer, 0))
        except RuntimeError as error:
            raise PeerError(peer, "sending to", False, str(error)) from error

    def receive_bytes(
        self, peer: int, channel: Channel, buffer: Tensor, views: tuple[Tensor, ...] | None = None
    ) -> Incoming:
        """See `Transport.receive_bytes`; the transfer starts after what the current stream holds now."""
        if channel is Channel.ORDERS:
            return super().receive_bytes(peer, channel, buffer, views)
        try:
            work = _StreamWork(self._group_of(peer, self.rank, channel).recv([buffer], peer, 0))
        except RuntimeError as error:
            raise PeerError(peer, "receiving from", False, str(error)) from error
        self._receiving.append((peer, work))
        return Incoming(self, peer, "receiving from", cast(Any, work), (buffer,) if views is None else views)

    def _group_of(self, source: int, target: int, channel: Channel) -> Any:
        name = _ESTIMATES if channel is Channel.ESTIMATES else _FORWARD if source < target else _BACKWARD
        if name not in self._nccl:
            raise RuntimeError("the connection was closed")
        return self._nccl[name]

    def _connect(self) -> None:
        """Make the communicators of all pairs now: it takes seconds and needs both sides at once."""
        token = torch.zeros(64, dtype=torch.uint8, device=self.device)
        for low, high in combinations(range(self.world_size), 2):
            if self.rank not in (low, high):
                continue
            for name, source, target in (
                (_FORWARD, low, high), (_BACKWARD, high, low), (_ESTIMATES, high, low),
            ):
                group = self._nccl[name]
                work = group.send([token], target, 0) if self.rank == source else group.recv([token], source, 0)
                work.wait()
        torch.cuda.synchronize(self.device)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
