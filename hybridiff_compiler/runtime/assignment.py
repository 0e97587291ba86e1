"""Which device and how many CPU threads every rank of a plan gets."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from ..ir import InputError, Plan, PlanMismatchError, UsageError
from .torchrun import own_device, own_rank

__all__ = ["assign_devices", "threads_per_rank"]


def assign_devices(
    plan: Plan, denoiser: nn.Module, devices: Sequence[str | torch.device] | None
) -> list[torch.device]:
    """The device of every rank; also checks what can be told before any work.

    Raises:
        PlanMismatchError, UsageError, InputError: see `parallelize`.
    """
    name = type(denoiser).__name__
    if plan.model.denoiser != name:
        raise PlanMismatchError(
            f"the plan was made for a {plan.model.denoiser} ({plan.model.name}), this pipeline has a {name}; "
            "profile this model and plan again"
        )
    planned = [spec.device for spec in plan.ranks]
    kinds = planned if devices is None else [torch.device(device).type for device in devices]
    if kinds != planned:
        raise PlanMismatchError(f"the plan is for {len(planned)} ranks on {planned}, got devices {kinds}")
    if len(set(planned)) > 1:
        raise UsageError(f"ranks on {sorted(set(planned))}: all ranks of a plan must be on one kind of device")
    own = next(denoiser.parameters()).device
    if planned[0] == "cpu":
        assigned = [torch.device("cpu")] * len(planned)
    elif own_rank() is not None and len(planned) > 1:
        assigned = [own_device("cuda")] * len(planned)  # every rank knows its own; the others may be on other hosts
    else:
        count = torch.cuda.device_count()
        if count < len(planned):
            raise UsageError(f"the plan is for {len(planned)} GPUs, this machine has {count} that torch can use")
        first = own.index if own.type == "cuda" and own.index is not None else 0
        order = [first, *(index for index in range(count) if index != first)]
        assigned = [torch.device("cuda", index) for index in order[:len(planned)]]
        if devices is not None:
            indices = [torch.device(device).index for device in devices]
            assigned = [d if i is None else torch.device("cuda", i) for d, i in zip(assigned, indices)]
        if len(set(assigned)) < len(assigned):
            raise UsageError(f"every rank needs a GPU of its own, got {[str(device) for device in assigned]}")
    waiting = plan.weights == "stages" and own.type == "cpu"  # its own stages are moved there
    if not waiting and (own.type != planned[0] or (own.type == "cuda" and own != assigned[0])):
        raise InputError(
            f"the denoiser is on {own}, rank 0 of the plan on {assigned[0]}; move it with pipe.to({str(assigned[0])!r})"
        )
    return assigned


def threads_per_rank(world_size: int) -> int:
    """The processors that this process may use, divided by the number of ranks; at least one."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)) // world_size)
    return max(1, (os.cpu_count() or 1) // world_size)
