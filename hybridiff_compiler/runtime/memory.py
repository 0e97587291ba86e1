"""How much memory a rank's process has needed."""

from __future__ import annotations

import resource
import sys

import torch

__all__ = ["forget_peak", "peak_bytes"]


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: what torch has reserved on a GPU, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def forget_peak(device: torch.device) -> None:
    """Give back memory that is only kept for later, and count anew, where that can be done (GPUs)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
