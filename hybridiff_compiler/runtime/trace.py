"""Recording what every rank's device really did: kernels and transfers on one time axis, as a Chrome trace."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..ir import UsageError, write_atomically

__all__ = ["RankTrace", "merge_traces"]


class RankTrace:
    """The profiler of one rank's process."""

    def __init__(self, device: torch.device) -> None:
        """
        Raises:
            UsageError: not a GPU. (Recording CPU operators was seen to corrupt memory beside communication threads.)
        """
        if device.type != "cuda":
            raise UsageError(f"traces are recorded on GPUs, this plan runs on {device}; time it with stage_seconds")
        self._device = device
        self._profile = profile(activities=[ProfilerActivity.CUDA])

    def start(self) -> None:
        """Record from now on."""
        self._profile.start()

    def stop(self, file: str | os.PathLike[str]) -> None:
        """Wait for the device, then write what was recorded (JSON)."""
        torch.cuda.synchronize(self._device)
        self._profile.stop()
        self._profile.export_chrome_trace(str(file))


def merge_traces(files: Sequence[Path], target: Path) -> Path:
    """One gzipped Chrome trace from one file per rank; a rank's lanes are named `rank R`.

    The profiler stamps events with the host's clock, so ranks of one host share the time axis.
    """
    events: list[dict[str, Any]] = []
    for rank, file in enumerate(files):
        for event in json.loads(file.read_text())["traceEvents"]:
            if event.get("ph") == "X":
                events.append(event | {"pid": f"rank {rank}, {event.get('pid')}"})

    def write(file: Path) -> None:
        with gzip.open(file, "wt") as stream:
            json.dump({"traceEvents": events}, stream)

    return write_atomically(target, write)
