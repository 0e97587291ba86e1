"""Point-to-point transport between the ranks of one plan: packed messages over a process group of its own.

One message per pair of ranks and occasion, however many tensors it carries; buffers are allocated at the first use and
reused. The process group is made from a store directly: no global state of `torch.distributed` is touched, so a user's
own groups and several plans in one process do not meet.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any, Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from .processes import is_forked

__all__ = ["Channel", "Incoming", "Layout", "PeerError", "Transport", "Waitable", "allocate"]

_ALIGNMENT = 64
_FOREVER = timedelta(days=3650)
_CONNECTING = timedelta(seconds=30)
"""All ranks have said that they connect now."""
_TRANSFERRING = timedelta(minutes=10)
"""Of one piece of the weights."""


class Channel(IntEnum):
    """Kinds of messages; within one kind and pair of ranks they arrive in the order in which they were sent."""

    ORDERS = 0
    """From the driver: what to compute, with the inputs that changed."""
    VALUES = 1
    """Between any two ranks: values of the graph."""
    ESTIMATES = 2
    """To the driver."""
    INPUTS = 3
    """From the driver: inputs that are on its device."""
    BANDS = 4
    """Between any two ranks: what the bands of a decode need of each other."""


class PeerError(Exception):
    """Talking to another rank failed: it is gone, or it stayed silent for too long."""

    def __init__(
        self, peer: int, doing: str, timed_out: bool, cause: str, *, silent: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(f"{doing} rank {peer}: {cause}")
        self.peer, self.doing, self.timed_out = peer, doing, timed_out
        self.silent = silent if silent is not None else (peer,) if timed_out else ()
        """Ranks that did not answer in time."""


class Layout:
    """Tensors of known shapes one after the other in one buffer of bytes, each aligned to 64 bytes."""

    def __init__(self, specs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.specs = tuple(specs)
        offset = 0
        places = []
        for shape, dtype in self.specs:
            nbytes = math.prod(shape) * dtype.itemsize
            places.append((offset, nbytes))
            offset += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._places = tuple(places)
        self.nbytes = max(offset, _ALIGNMENT)

    def views(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """The tensors inside `buffer`, 1-d uint8 of at least `nbytes`."""
        with torch.inference_mode(False):  # else the views could not be written to outside of that mode
            return tuple(
                buffer[offset:offset + nbytes].view(dtype).view(shape)
                for (shape, dtype), (offset, nbytes) in zip(self.specs, self._places)
            )


def allocate(nbytes: int, device: torch.device | str = "cpu") -> Tensor:
    """A buffer of bytes that any later step may write to, also when first used inside `torch.inference_mode`."""
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


class Waitable(Protocol):
    """A transfer that was started."""

    def wait(self, timeout: timedelta) -> Any:
        """Wait for its end, or raise `RuntimeError`."""


class _Transfer:
    """One of gloo's transfers, which keeps the connections for as long as it exists: the transport can drop it."""

    __slots__ = ("__weakref__", "_work")

    def __init__(self, work: dist.Work) -> None:
        self._work: dist.Work | None = work

    def wait(self, timeout: timedelta) -> None:
        """See `dist.Work.wait`."""
        if self._work is None:
            raise RuntimeError("the connections are closed")
        self._work.wait(timeout)

    def drop(self) -> None:
        """Whatever is still to come is not wanted."""
        self._work = None


class Incoming:
    """A message on its way to this rank."""

    def __init__(self, transport: Transport, peer: int, doing: str, work: Waitable, tensors: tuple[Tensor, ...]):
        self._transport, self._peer, self._doing, self._work, self._tensors = transport, peer, doing, work, tensors

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, once they are there.

        Raises:
            PeerError: the sender is gone or silent for longer than the transport's time limit.
        """
        self._transport.wait(self._work, self._peer, self._doing)
        return self._tensors


class _Buffers:
    """Two buffers used in turn for one kind of message between two ranks.

    Two are enough: a message carries newest copies only, so when the third arrives nobody looks at the first any more.
    """

    def __init__(self, layout: Layout, allocate_bytes: Callable[[int], Tensor]) -> None:
        self.pairs = [(buffer := allocate_bytes(layout.nbytes), layout.views(buffer)) for _ in range(2)]
        self.works: list[Waitable | None] = [None, None]
        self._turn = 0

    def next(self) -> int:
        self._turn ^= 1
        return self._turn


class Transport:
    """Messages of one rank over gloo, on CPU tensors."""

    posts_early = True
    """Whether receives should be started as soon as they are foreseen, rather than when this rank's part is done."""

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, *, timeout_s: float | None, one_host: bool = True
    ) -> None:
        """Connects to all other ranks, which must do the same at the same time.

        Args:
            store: where the ranks find each other; reachable from all of them.
            rank: this rank.
            world_size: number of ranks.
            timeout_s: seconds to wait for a message before the peer counts as hung; None waits for ever.
            one_host: whether all ranks are on this host; else the network interface is chosen as torch's gloo does.
        """
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.sent_messages: Counter[Channel] = Counter()
        self.sent_bytes: Counter[Channel] = Counter()
        self.received_bytes: Counter[Channel] = Counter()
        self._timeout = _FOREVER if timeout_s is None else timedelta(seconds=timeout_s)
        self._buffers: dict[tuple[bool, int, Channel, Layout], _Buffers] = {}
        self._received: set[int] = set()
        self._transfers: WeakSet[_Transfer] = WeakSet()
        self._owner = os.getpid()
        self._group: Any = _gloo_group(store, rank, world_size, one_host)

    def send(self, peer: int, channel: Channel, layout: Layout, tensors: Sequence[Tensor]) -> None:
        """Start sending `tensors` to `peer`; they may be changed as soon as this returns."""
        buffers = self._buffers_of(True, peer, channel, layout)
        turn = buffers.next()
        previous = buffers.works[turn]
        if previous is not None:
            self.wait(previous, peer, "sending to")
        buffer, views = buffers.pairs[turn]
        for view, tensor in zip(views, tensors, strict=True):
            view.copy_(tensor)
        buffers.works[turn] = self.send_bytes(peer, channel, buffer)

    def receive(self, peer: int, channel: Channel, layout: Layout, *, keep: bool = False) -> Incoming:
        """Start receiving from `peer`.

        The tensors live in reused buffers: they are valid until the second next message of this layout is asked for.
        With `keep` they are new memory and stay valid.
        """
        self.received_bytes[channel] += layout.nbytes
        if keep:
            buffer = self._allocate(layout.nbytes)
            views = layout.views(buffer)
        else:
            buffers = self._buffers_of(False, peer, channel, layout)
            buffer, views = buffers.pairs[buffers.next()]
        return self.receive_bytes(peer, channel, buffer, views)

    def send_bytes(self, peer: int, channel: Channel, buffer: Tensor) -> Waitable:
        """Start sending a buffer, which must not change until the transfer has ended."""
        self.sent_messages[channel] += 1
        self.sent_bytes[channel] += buffer.numel()
        try:
            return self._started(self._group.send([buffer], peer, int(channel)))
        except RuntimeError as error:
            raise PeerError(peer, "sending to", False, str(error)) from error

    def receive_bytes(
        self, peer: int, channel: Channel, buffer: Tensor, views: tuple[Tensor, ...] | None = None
    ) -> Incoming:
        """Start receiving into a buffer, which may be longer than the message."""
        try:
            work = self._group.recv([buffer], peer, int(channel))
        except RuntimeError as error:
            raise PeerError(peer, "receiving from", False, str(error)) from error
        transfer = self._started(work)
        return Incoming(self, peer, "receiving from", transfer, (buffer,) if views is None else views)

    def _started(self, work: dist.Work) -> _Transfer:
        transfer = _Transfer(work)
        self._transfers.add(transfer)
        return transfer

    def owns(self, tensor: Tensor) -> bool:
        """Whether `tensor` lives in a receive buffer that a later message will overwrite."""
        return tensor.untyped_storage().data_ptr() in self._received

    def wait(self, work: Waitable, peer: int, doing: str) -> None:
        """Wait for a transfer.

        Raises:
            PeerError: see `Incoming.wait`.
        """
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            text = str(error)
            # gloo has no error type of its own for an expired wait; its messages all say so in these words.
            raise PeerError(peer, doing, "imed out" in text or "imeout" in text, text) from error

    def broadcast(self, tensors: Sequence[Tensor], *, root: int = 0, window: int = 16) -> None:
        """Give every rank the root's `tensors` (dense 1-d bytes, the same list everywhere); only for start-up."""
        works: list[dist.Work] = []
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        try:
            for tensor in tensors:
                works.append(self._group.broadcast([tensor], options))
                if len(works) >= window:
                    works.pop(0).wait()
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise PeerError(root, "broadcasting with", False, str(error)) from error

    def close(self) -> None:
        """Drop the connections; pending transfers fail."""
        if is_forked(self._owner, self):
            return
        self._buffers.clear()
        for transfer in list(self._transfers):
            transfer.drop()
        group, self._group = self._group, None
        del group

    def _allocate(self, nbytes: int) -> Tensor:
        return allocate(nbytes)

    def _buffers_of(self, sending: bool, peer: int, channel: Channel, layout: Layout) -> _Buffers:
        key = (sending, peer, channel, layout)
        if key not in self._buffers:
            buffers = self._buffers[key] = _Buffers(layout, self._allocate)
            if not sending:
                self._received.update(buffer.untyped_storage().data_ptr() for buffer, _ in buffers.pairs)
        return self._buffers[key]


def _gloo_group(store: dist.Store, rank: int, world_size: int, one_host: bool) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # Bound to the loopback address: gloo's default looks the host's name up, which fails on machines without one.
    group = dist.ProcessGroupGloo
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    options._devices = [
        group.create_device(hostname="127.0.0.1") if one_host
        else group.create_device(interface=interface) if interface else group.create_default_device()
    ]
    options._timeout = _CONNECTING  # a rank that died meanwhile is not noticed earlier
    options._threads = 1
    connected: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, world_size, options)
    connected._set_default_timeout(_TRANSFERRING)
    return connected
