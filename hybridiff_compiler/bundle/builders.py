"""Building the artifacts of a plan in several processes (see `runtime.ahead`).

Each builder process gets the denoiser without its weights, puts random ones in their place, captures it, and compiles
the graphs that it is given. So this is for backends whose artifacts hold no weights, and it makes sure of that: nothing
that a compiler could learn from the weights' values ends up in an artifact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..backends.target import Target
from ..ir import Plan
from ..runtime.ahead import Builders, default_jobs, own_cores
from ..runtime.handover import pack_skeleton

__all__ = ["BuildOrder", "build_in_processes", "default_jobs"]


@dataclass(frozen=True)
class BuildOrder:
    """One artifact to build."""

    digest: str
    """Of the stage graph."""
    name: str
    """Of the file, without its ending."""


def build_in_processes(
    plan: Plan, denoiser: nn.Module, backend: str, target: Target, folder: Path, orders: Sequence[BuildOrder],
    *, jobs: int, on_built: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Build all `orders` in `jobs` processes.

    Args:
        plan: whose graphs they are.
        denoiser: the network; its weights are not sent.
        backend: its name; one whose artifacts hold no weights.
        target: what to build for.
        folder: where the files go.
        orders: what to build; the first ones first.
        jobs: number of processes.
        on_built: called with the number of finished ones.

    Returns:
        The files, in the order of `orders`.

    Raises:
        InputError: a graph could not be compiled; says why.
    """
    skeleton, _ = pack_skeleton(denoiser)
    threads = max(1, own_cores() // jobs)
    start = {
        "plan": plan.model_dump_json(), "backend": backend, "target": target.model_dump_json(), "folder": str(folder),
        "device": str(next(denoiser.parameters()).device), "threads": threads,
    }
    frames = (json.dumps(start).encode(), skeleton)
    with Builders("hybridiff_compiler.bundle.builder", frames, min(jobs, len(orders)), threads=threads) as builders:
        builders.start([[order.digest, order.name] for order in orders])
        return [Path(answer["file"]) for answer in builders.wait(on_built)]
