"""A process that compiles graphs for a rank: `python -m hybridiff_compiler.runtime.builder`, started by `building`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from ..ir import Plan
from .ahead import serve_jobs
from .executor import RankExecutors, graphs_for
from .handover import scramble, unpack_skeleton
from .settings import NumericSettings

__all__ = ["main"]


def main() -> None:
    """Take the denoiser, then compile one graph per job."""
    serve_jobs(2, _begin)


def _begin(message: bytes, skeleton: bytes) -> Callable[[Any], str]:
    start = json.loads(message)
    device = torch.device(start["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    NumericSettings(**start["settings"]).apply()
    plan = Plan.parse(start["plan"], source="plan from the parent")
    denoiser, tensors = unpack_skeleton(skeleton, device)
    scramble(tensors)
    backend = start["backend"]
    executors = RankExecutors(
        plan, denoiser, graphs_for(plan, denoiser, backend), rank=start["rank"], transport=None, backend=backend
    )

    def build(job: Any) -> str:
        images, number = job
        executor = executors.at(images)
        executor.runner.prepare([executor.segments[number]])
        return "built"

    return build


if __name__ == "__main__":
    main()
