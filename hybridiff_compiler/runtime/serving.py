"""What a rank other than the driver does: take the weights, build its graphs, and follow the driver's orders."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..ir import Plan
from .branch_calls import scale_signature
from .building import RankBuild
from .connect import connect
from .decode_ranks import DecodeCall, DecodeRank
from .executor import RankExecutor, RankExecutors, graphs_for
from .handover import raw_bytes, unpack_skeleton
from .memory import peak_bytes
from .orders import DECODING, REPORTING, RESIZING, TIMING, TRACING, Order, OrderInbox
from .processes import HELD, JOINED, READY, REPORTED, RESIZED, TIMED, TRACED
from .stage_weights import held_bytes, receive_held
from .trace import RankTrace

__all__ = ["Server"]


class Server:
    """One rank serving orders."""

    def __init__(
        self, rank: int, start: dict[str, Any], skeleton: bytes, store: dist.Store,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            rank: this rank, 1 or more.
            start: the driver's start message (see `parallelize`).
            skeleton: of the denoiser (see `handover`).
            store: where ranks find each other and answer.
            device: default: the one that the start message names.
        """
        self.step: int | None = None
        """The step that is or was computed last, for reports of failures."""
        self._rank, self._start, self._skeleton, self._store = rank, start, skeleton, store
        self._plan = Plan.parse(start["plan"], source="plan from the driver")
        self._names = [pattern.name for pattern in self._plan.patterns]
        self._device = torch.device(start["devices"][rank]) if device is None else device
        self._generation = -1
        self._trace: RankTrace | None = None

    @torch.no_grad()
    def serve(self) -> None:
        """Run orders for ever.

        Raises:
            PeerError: the driver is gone.
        """
        plan, store, rank = self._plan, self._store, self._rank
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        held = None if self._start["held"] is None else self._start["held"][rank]
        handed, tensors = unpack_skeleton(self._skeleton, self._device, held=held)
        denoiser, decoder = handed if isinstance(handed, nn.ModuleList) else (handed, None)
        store.set(f"{JOINED}/{rank}", "")
        transport = connect(
            store, rank, plan.world_size, timeout_s=None, device=self._device, one_host=self._start["one_host"]
        )
        if held is None:
            transport.broadcast([raw_bytes(tensor) for tensor in tensors if tensor.numel()])
        else:
            receive_held(transport, tensors, held)
            store.set(f"{HELD}/{rank}", str(held_bytes(denoiser)))
        backend = self._start["backend"]
        executors = RankExecutors(
            plan, denoiser, graphs_for(plan, denoiser, backend), rank=rank, transport=transport, backend=backend
        )
        RankBuild(
            plan, denoiser, executors, self._start["batch_sizes"], rank=rank, backend=backend,
            neighbours=self._start["neighbours"],
        ).run()
        decoding = None if decoder is None else self._decode_rank(decoder)
        inbox = OrderInbox(transport, plan.model.signature, plan.num_steps)
        executor = executors.at(1)
        store.set(f"{READY}/{rank}", "")
        while True:
            order = inbox.receive()
            if order.step == RESIZING and order.following is not None:
                executor.reset()
                inbox.resize(scale_signature(plan.model.signature, 1, order.following))
                executor = executors.at(order.following)
                executor.prepare()
                store.set(f"{RESIZED}-{order.generation}/{rank}", "")
            elif order.step == TRACING:
                self._follow_trace(order)
            elif order.step == REPORTING:
                store.set(f"{REPORTED}/{order.following}/{rank}", str(peak_bytes(self._device)))
            elif order.step == DECODING and decoding is not None:
                self.step = None
                decoding.serve(transport)
            elif order.step == TIMING and order.pattern is not None:
                seconds = executor.stage_seconds(self._names[order.pattern])
                store.set(f"{TIMED}/{order.following}/{rank}", str(seconds))
            else:
                self._follow(order, executor, inbox)

    def _decode_rank(self, decoder: nn.Module) -> DecodeRank:
        """This rank's part of decodes, ready to run."""
        part = DecodeRank(
            decoder, DecodeCall.parse(self._start["decode"]), rank=self._rank, ranks=self._plan.world_size,
            device=self._device, backend=self._start["decode_backend"],
        )
        part.prepare()
        return part

    def _follow(self, order: Order, executor: RankExecutor, inbox: OrderInbox) -> None:
        self.step = order.step
        if order.generation != self._generation:
            self._generation = order.generation
            executor.reset()
        for pattern in order.missed:
            executor.skip(self._names[pattern])
        if order.pattern is not None:
            following = None if order.following is None else self._names[order.following]
            moment = inbox.moment(order)
            executor.run(self._names[order.pattern], following, inbox.inputs, moment)

    def _follow_trace(self, order: Order) -> None:
        done = f"{TRACED}/{order.following}/{self._rank}"
        if order.pattern == 0:
            self._trace = RankTrace(self._device)
            self._trace.start()
            self._store.set(f"{done}/started", "")
        elif self._trace is not None:
            trace, self._trace = self._trace, None
            trace.stop(self._store.get(f"{TRACED}/{order.following}").decode() + f"/{self._rank}.json")
            self._store.set(done, "")
