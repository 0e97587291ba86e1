"""The transport that fits a rank's device."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .nccl import NcclTransport
from .transport import Transport

__all__ = ["connect"]


def connect(
    store: dist.Store, rank: int, world_size: int, *, timeout_s: float | None, device: torch.device,
    one_host: bool = True,
) -> Transport:
    """NCCL between GPUs, gloo otherwise; all ranks connect at the same time."""
    if device.type == "cuda":
        return NcclTransport(store, rank, world_size, timeout_s=timeout_s, device=device, one_host=one_host)
    return Transport(store, rank, world_size, timeout_s=timeout_s, one_host=one_host)
