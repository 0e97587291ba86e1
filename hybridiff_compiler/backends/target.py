"""What an artifact was made for: a kind of device and the versions of the libraries that load it."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from ..ir import Data, PlanMismatchError

__all__ = ["ANY", "Target", "cpu_arch", "cuda_arch"]

ANY = "any"
"""Architecture of artifacts that run everywhere."""


class Target(Data):
    """Device, dtype and versions that an artifact is valid for."""

    device: Literal["cpu", "cuda"]
    arch: str = Field(min_length=1)
    """`sm_89` for a GPU of compute capability 8.9; machine, vector extension and features' hash for a CPU; or `any`."""
    dtype: str
    """Of the denoiser: torch dtype without the prefix."""
    versions: dict[str, str]
    """Of torch, and of the library that made the artifact where it must be the same one."""

    def check(self, versions: dict[str, str]) -> None:
        """Refuse a target that is not this machine.

        Args:
            versions: of the libraries here, by the names in `versions`.

        Raises:
            PlanMismatchError: says what differs and what to do.
        """
        for name, made_with in self.versions.items():
            here = versions.get(name, "none")
            if here != made_with:
                raise PlanMismatchError(
                    f"the bundle was compiled with {name} {made_with}, here is {here}; install {name} {made_with}, or "
                    "run `hybridiff compile` again here"
                )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise PlanMismatchError(
                f"the bundle was compiled for a CUDA device ({self.arch}), this machine has none; run it on a machine "
                "with one, or plan and compile for the CPU"
            )
        if self.arch == ANY:
            return
        here = cpu_arch() if self.device == "cpu" else cuda_arch()
        if here != self.arch:
            raise PlanMismatchError(
                f"the bundle was compiled for {self.device} {self.arch}, this machine's is {here}; run `hybridiff "
                "compile` again on this machine"
            )


def cpu_arch() -> str:
    """Machine, widest vector extension that torch uses, and a hash of all processor features.

    Compiled code may use every feature of the processor that it was compiled on.
    """
    info = Path("/proc/cpuinfo")
    features = ""
    if info.is_file():
        lines = info.read_text(errors="replace").splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    words = sorted(features.partition(":")[2].split())
    suffix = f"-{hashlib.sha256(' '.join(words).encode()).hexdigest()[:8]}" if words else ""
    return f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability().lower()}{suffix}"


def cuda_arch() -> str:
    """`sm_90` for the present CUDA device of compute capability 9.0."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"
