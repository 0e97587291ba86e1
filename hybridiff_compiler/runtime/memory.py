"""How much memory a rank's process has needed."""

from __future__ import annotations

import resource
import sys

import torch

__all__ = ["peak_bytes"]


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: what torch has reserved on a GPU, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
