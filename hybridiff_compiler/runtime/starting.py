"""Starting the workers of a plan: their processes, what they are told and given, and the connection to them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ir import Plan
from .connect import connect
from .decode_route import DECODE_BACKEND, Decoding
from .executor import graphs_for
from .handover import pack_skeleton, raw_bytes
from .nccl import ENVIRONMENT
from .processes import JOINED, Pool, WorkerPool, open_store
from .segments import is_bundle
from .settings import NumericSettings
from .stage_weights import closed_forward, held_numbers, only_held, send_held
from .torchrun import TorchrunPool, is_one_host, neighbour_count, own_rank, rendezvous
from .transport import PeerError, Transport

if TYPE_CHECKING:
    from ..bundle import StoredGraphs
    from ..capture import CapturedDenoiser

__all__ = ["START_TIMEOUT_S", "Order", "Started", "start_workers"]

START_TIMEOUT_S = 600.0
"""Longest time for a worker to import, take the weights and build its graphs; a dead one is noticed at once."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be started."""

    plan: Plan
    denoiser: nn.Module
    devices: Sequence[torch.device]
    """One per rank."""
    batch_sizes: Sequence[int]
    """Images per call that graphs are built for at once."""
    backend: str
    threads: int
    """Of the CPU, per rank."""
    timeout_s: float
    """Of an answer within a step."""
    decoding: Decoding | None


@dataclass(frozen=True, kw_only=True)
class Started:
    """The workers, which build their graphs now, and what rank 0 has for doing the same."""

    captured: CapturedDenoiser | StoredGraphs
    pool: Pool | None = None
    """None in a world of one rank, and so the transport."""
    transport: Transport | None = None
    neighbours: int = 1
    """Ranks on this host."""


def start_workers(order: Order, resources: contextlib.ExitStack) -> Started:
    """Start the further ranks, give them plan and denoiser, and connect to them; `resources` end them again.

    With stage-only weights the denoiser holds the parameters of rank 0's stages alone afterwards, until `resources` are
    closed.

    Raises:
        WorkerError: a worker could not be started.
        PlanMismatchError: the plan is for another model, or a bundle for other graphs.
    """
    plan, denoiser, backend = order.plan, order.denoiser, order.backend
    # A bundle is looked at first, since that takes no time; a capture while the workers import what they need.
    captured = graphs_for(plan, denoiser, backend) if is_bundle(backend) or plan.world_size == 1 else None
    if plan.world_size == 1:
        assert captured is not None
        return Started(captured=captured)
    shared = order.decoding if order.decoding is not None and order.decoding.on_all_ranks else None
    skeleton, tensors = pack_skeleton(denoiser if shared is None else nn.ModuleList([denoiser, shared.decoder]))
    pool: Pool
    if own_rank() is not None:
        store = rendezvous(plan)
        pool = TorchrunPool(store, plan.world_size)
        neighbours = neighbour_count()
        address: dict[str, Any] = {"one_host": is_one_host(), "neighbours": neighbours}
    else:
        served = store = open_store()
        environment = ENVIRONMENT if order.devices[0].type == "cuda" else {}
        pool = WorkerPool(plan.world_size, store, threads=order.threads, environment=environment)
        neighbours = plan.world_size
        address = {"one_host": True, "neighbours": neighbours, "host": "127.0.0.1", "port": served.port}
    resources.callback(pool.close)
    captured = captured or graphs_for(plan, denoiser, backend)
    held = None
    if plan.weights == "stages":
        everywhere = [] if shared is None else [*shared.decoder.parameters(), *shared.decoder.buffers()]
        held = held_numbers(plan, denoiser, captured, tensors, everywhere)
    transport = _hand_over(order, resources, pool, store, address, skeleton, tensors, held)
    if held is not None:
        moves = next(denoiser.parameters()).device != order.devices[0]
        resources.enter_context(only_held(tensors, held[0], order.devices[0]))
        resources.enter_context(closed_forward(denoiser))
        captured = graphs_for(plan, denoiser, backend) if moves else captured
    return Started(captured=captured, pool=pool, transport=transport, neighbours=neighbours)


def _hand_over(
    order: Order, resources: contextlib.ExitStack, pool: Pool, store: dist.Store, address: dict[str, Any],
    skeleton: bytes, tensors: list[Tensor], held: list[list[int]] | None,
) -> Transport:
    """Give the workers plan and denoiser, and connect to them."""
    plan = order.plan
    start = {
        "plan": plan.model_dump_json(), "backend": order.backend,
        "settings": NumericSettings.current().to_json(), "devices": [str(device) for device in order.devices],
        "batch_sizes": list(order.batch_sizes), "decode_backend": DECODE_BACKEND,
        "held": held, "decode": None if order.decoding is None else order.decoding.call.to_json(),
    } | address
    for rank in range(1, plan.world_size):
        pool.send_frame(rank, json.dumps(start).encode())
        pool.send_frame(rank, skeleton)
    pool.wait_for(JOINED, timeout_s=START_TIMEOUT_S)
    try:
        transport = connect(
            store, 0, plan.world_size, timeout_s=order.timeout_s, device=order.devices[0], one_host=address["one_host"],
        )
        resources.callback(transport.close)
        if held is None:
            transport.broadcast([raw_bytes(tensor) for tensor in tensors if tensor.numel()])
        else:
            send_held(transport, tensors, held)
    except (PeerError, RuntimeError) as error:
        raise pool.failure("starting", suspect=getattr(error, "peer", None)) from error
    return transport
