"""The one message per step from the driver to a worker: which pattern to run, and the input leaves that changed.

Fixed layout, no pickling: a header of integers, one code per leaf and branch, then the bytes of the leaves that follow.
Leaves that did not change since the worker last got them do not travel, so a prompt's embeddings cross once per
generation; a leaf that both branches share crosses once. A branch's leaves go to a rank when that rank first needs the
branch, whichever pattern that is. Leaves on a GPU follow the order as a message of their own.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.kept import Moment, memory_key
from ..capture.call import TIMESTEP
from ..ir import BRANCHES, Branch, CallSignature
from .transport import Channel, Incoming, Layout, Transport, allocate

__all__ = [
    "DECODING", "MAX_MISSED", "REPORTING", "RESIZING", "TIMING", "TRACING", "Leaf", "Order", "OrderInbox",
    "OrderOutbox", "leaf_slots",
]

Leaf = tuple[Branch, str]
"""Branch and leaf path."""

TIMING = -1
"""Step number of an order to time the graphs of its pattern instead of running them; `following` numbers the answer."""

TRACING = -2
"""Step number of an order to start recording a trace (`pattern` 0) or to write it (1); `following` numbers it."""

RESIZING = -3
"""Step number of an order to go on with `following` images per call. Another order follows in the old format, for the
receive that waits already; all later ones are in the new format."""

REPORTING = -4
"""Step number of an order to report the peak of this rank's memory; `following` numbers the answer."""

DECODING = -5
"""Step number of an order to compute this rank's band of an image, whose latents follow."""

MAX_MISSED = 64
"""Steps that one order can tell a worker to catch up with."""

_TIMESTEPS: Leaf = (BRANCHES[0], "")
"""Stands for the timesteps of all steps, which belong to no branch and are no leaf."""
_NONE = -1
_UNCHANGED, _FOLLOWS, _SAME_AS_OTHER, _ON_DEVICE = range(4)
_HEADER = struct.Struct(f"<6q{MAX_MISSED}h")
_ALIGNMENT = 64


@dataclass(frozen=True)
class Order:
    """What a worker is told about one step."""

    generation: int
    """Counts up; a new number resets the worker."""
    step: int
    pattern: int | None
    """Index into the plan's patterns; None: only catch up."""
    following: int | None
    """The pattern of the next step that computes anything, when that is known already."""
    missed: tuple[int, ...] = ()
    """Patterns of the steps of this generation that this rank had no part in, since its last order."""
    has_timesteps: bool = False
    """Whether the timesteps of all steps are known."""


def leaf_slots(signature: CallSignature) -> dict[Leaf, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor leaf of both branches, in the order of the codes."""
    return {
        (branch, leaf.path): (leaf.shape, getattr(torch, leaf.dtype or "float32"))
        for branch in BRANCHES for leaf in signature.leaves if leaf.shape is not None
    }


class _Format:
    """Where things are in an order."""

    def __init__(self, signature: CallSignature, steps: int) -> None:
        self.leaves = leaf_slots(signature)
        timestep = self.leaves.get((BRANCHES[0], TIMESTEP))
        if timestep is not None:
            self.leaves[_TIMESTEPS] = (steps,), timestep[1]
        self.codes_at = _HEADER.size
        self.payload_at = -(-(_HEADER.size + len(self.leaves)) // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = self.payload_at + Layout(list(self.leaves.values())).nbytes
        self._layouts: dict[tuple[int, bytes], Layout] = {}
        self._views: dict[tuple[int, bytes], tuple[Tensor, ...]] = {}

    def layout(self, codes: bytes, wanted: int = _FOLLOWS) -> Layout:
        """Layout of the leaves with code `wanted`: those that follow in the order, or those on the device."""
        key = wanted, codes
        if key not in self._layouts:
            specs = [spec for spec, code in zip(self.leaves.values(), codes) if code == wanted]
            self._layouts[key] = Layout(specs)
        return self._layouts[key]

    def views(self, buffer: Tensor, codes: bytes) -> tuple[Tensor, ...]:
        """The leaves that follow, inside `buffer`, which is one of the few that live as long as this object."""
        key = id(buffer), codes
        if key not in self._views:
            self._views[key] = self.layout(codes).views(buffer[self.payload_at:])
        return self._views[key]


class OrderOutbox:
    """The driver's side: packs and sends orders, and knows which leaves every worker has."""

    def __init__(self, transport: Transport, signature: CallSignature, steps: int) -> None:
        """
        Args:
            transport: to the workers.
            signature: one branch's call.
            steps: so many timesteps an order has room for.
        """
        self._transport, self.steps = transport, steps
        self._works: dict[int, list] = {rank: [None, None] for rank in range(1, transport.world_size)}
        self._turn = 0
        self._set_format(signature)

    def _set_format(self, signature: CallSignature) -> None:
        self._format = _Format(signature, self.steps)
        workers = range(1, self._transport.world_size)
        self._buffers = {rank: [allocate(self._format.nbytes) for _ in range(2)] for rank in workers}
        self._seen: dict[Leaf, tuple[object, Tensor]] = {}
        self._version: dict[Leaf, int] = dict.fromkeys(self._format.leaves, 0)
        self._has: dict[int, dict[Leaf, int]] = {rank: dict.fromkeys(self._format.leaves, -1) for rank in workers}
        self._timesteps = torch.zeros(0)

    def resize(self, generation: int, images: int, signature: CallSignature) -> None:
        """Have all workers go on with calls of `signature`, which has `images` images per branch."""
        for rank in range(1, self._transport.world_size):
            for _ in range(2):
                self.send(rank, Order(generation, RESIZING, None, images), ())
        for rank, works in self._works.items():
            for turn, work in enumerate(works):
                if work is not None:
                    self._transport.wait(work, rank, "sending to")
                works[turn] = None
        self._set_format(signature)

    def note(self, inputs: Mapping[Branch, Mapping[str, Tensor]], timesteps: Tensor | None = None) -> None:
        """Look at a step's inputs, and the timesteps of all steps if they are known: which are not what they were.

        A leaf is the same when it is the same memory, not written to since. Holding on to it keeps its memory from
        being handed out again, so that an equal address really means an equal tensor.
        """
        for leaf in self._format.leaves:
            tensor = timesteps if leaf == _TIMESTEPS else inputs[leaf[0]][leaf[1]]
            if tensor is None:
                continue
            key = memory_key(tensor)
            if key is None or leaf not in self._seen or self._seen[leaf][0] != key:
                self._seen[leaf] = key, tensor
                self._version[leaf] += 1
                if leaf == _TIMESTEPS:
                    room = self.steps - len(tensor)
                    self._timesteps = torch.cat([tensor, tensor.new_zeros(room)]) if room else tensor

    def send(self, rank: int, order: Order, branches: Collection[Branch]) -> None:
        """Send an order with the changed leaves of `branches`."""
        self._turn ^= 1
        work = self._works[rank][self._turn]
        if work is not None:
            self._transport.wait(work, rank, "sending to")
        buffer = self._buffers[rank][self._turn]
        codes, tensors, on_device = self._changed(rank, branches)
        missed = [*order.missed, *[_NONE] * (MAX_MISSED - len(order.missed))]
        memory = buffer.numpy().data
        pattern, following = (_NONE if p is None else p for p in (order.pattern, order.following))
        _HEADER.pack_into(
            memory, 0, order.generation, order.step, pattern, following, int(order.has_timesteps), len(order.missed),
            *missed,
        )
        memory[self._format.codes_at:self._format.codes_at + len(codes)] = codes
        used = self._format.payload_at
        if tensors:
            for view, tensor in zip(self._format.views(buffer, codes), tensors, strict=True):
                view.copy_(tensor)
            used += self._format.layout(codes).nbytes
        self._works[rank][self._turn] = self._transport.send_bytes(rank, Channel.ORDERS, buffer[:used])
        if on_device:
            self._transport.send(rank, Channel.INPUTS, self._format.layout(codes, _ON_DEVICE), on_device)

    def _changed(self, rank: int, branches: Collection[Branch]) -> tuple[bytes, list[Tensor], list[Tensor]]:
        has, codes = self._has[rank], bytearray()
        tensors: list[Tensor] = []
        on_device: list[Tensor] = []
        for leaf in self._format.leaves:
            branch, path = leaf
            wanted = branches and leaf in self._seen if leaf == _TIMESTEPS else branch in branches
            if not wanted or has[leaf] == self._version[leaf]:
                codes.append(_UNCHANGED)
                continue
            other: Leaf = (BRANCHES[0], path)
            if branch != other[0] and has[other] == self._version[other] and self._is_shared(path):
                codes.append(_SAME_AS_OTHER)
            else:
                tensor = self._timesteps if leaf == _TIMESTEPS else self._seen[leaf][1]
                apart = travels_apart(tensor)
                codes.append(_ON_DEVICE if apart else _FOLLOWS)
                (on_device if apart else tensors).append(tensor)
            has[leaf] = self._version[leaf]
        return bytes(codes), tensors, on_device

    def _is_shared(self, path: str) -> bool:
        keys = [self._seen[branch, path][0] for branch in BRANCHES]
        return keys[0] is not None and keys[0] == keys[1]


class OrderInbox:
    """A worker's side: receives orders and keeps the newest leaves."""

    def __init__(self, transport: Transport, signature: CallSignature, steps: int) -> None:
        """See `OrderOutbox`."""
        self._transport, self._steps = transport, steps
        self._turn = 0
        self.inputs: dict[Branch, dict[str, Tensor]] = {}
        """Per branch: leaf path -> tensor, as far as they were ever sent."""
        self._set_format(signature)

    def _set_format(self, signature: CallSignature) -> None:
        self._format = _Format(signature, self._steps)
        self._buffers = [allocate(self._format.nbytes) for _ in range(2)]
        self.inputs = {branch: {} for branch in BRANCHES}
        self._timesteps: Tensor | None = None
        self._next = self._ask()

    def resize(self, signature: CallSignature) -> None:
        """After an order to do so: receive calls of `signature` from now on."""
        self._next.wait()
        self._set_format(signature)

    def receive(self) -> Order:
        """Wait for the next order and take in its leaves."""
        buffer = self._buffers[self._turn]
        self._next.wait()
        self._next = self._ask()  # posted early, so that the driver's next message needs no round trip
        memory = buffer.numpy().data
        generation, step, pattern, following, timed, count, *missed = _HEADER.unpack_from(memory, 0)
        codes = bytes(memory[self._format.codes_at:self._format.codes_at + len(self._format.leaves)])
        self._take(codes, buffer)
        return Order(
            generation, step, None if pattern == _NONE else pattern, None if following == _NONE else following,
            tuple(missed[:count]), bool(timed),
        )

    def moment(self, order: Order) -> Moment | None:
        """Which step of which timesteps `order` is about, if those of all steps are known."""
        return Moment(self._timesteps, order.step) if order.has_timesteps and self._timesteps is not None else None

    def _take(self, codes: bytes, buffer: Tensor) -> None:
        if not any(codes):
            return
        views = iter(self._format.views(buffer, codes))
        received: Iterator[Tensor] = iter(())
        if _ON_DEVICE in codes:
            layout = self._format.layout(codes, _ON_DEVICE)
            received = iter(self._transport.receive(0, Channel.INPUTS, layout).wait())
        for (branch, path), code in zip(self._format.leaves, codes):
            if (branch, path) == _TIMESTEPS:
                if code != _UNCHANGED:
                    self._timesteps = next(views if code == _FOLLOWS else received).clone()
            elif code == _FOLLOWS:
                # New memory: a value that is kept for later steps may be a view of an input.
                self.inputs[branch][path] = next(views).clone()
            elif code == _ON_DEVICE:
                self.inputs[branch][path] = next(received).clone()
            elif code == _SAME_AS_OTHER:
                self.inputs[branch][path] = self.inputs[BRANCHES[0]][path]

    def _ask(self) -> Incoming:
        self._turn ^= 1
        return self._transport.receive_bytes(0, Channel.ORDERS, self._buffers[self._turn])


def travels_apart(tensor: Tensor) -> bool:
    """Whether a leaf goes as a message of its own, so that the host need not wait for it to pack the order."""
    return tensor.is_cuda
