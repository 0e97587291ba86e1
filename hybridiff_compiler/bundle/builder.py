"""A builder process: `python -m hybridiff_compiler.bundle.builder`, started by `builders.py` and nobody else."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..backends.artifact import Job, artifact_backend
from ..backends.onnx_weights import OnnxWeights
from ..backends.target import Target
from ..ir import HybridiffError, Plan
from ..runtime.ahead import serve_jobs
from ..runtime.handover import scramble, unpack_skeleton
from .writing import distinct_stages

__all__ = ["main"]


def main() -> None:
    """Take the denoiser, then compile one graph per order until the input ends."""
    serve_jobs(2, _begin)


def _begin(message: bytes, skeleton: bytes) -> Callable[[Any], dict[str, str]]:
    start = json.loads(message)
    torch.set_num_threads(int(start["threads"]))
    device = torch.device(start["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    plan = Plan.parse(start["plan"], source="plan from the parent")
    backend, target = artifact_backend(start["backend"]), Target.model_validate_json(start["target"])
    folder = Path(start["folder"])
    denoiser, tensors = unpack_skeleton(skeleton, device)
    scramble(tensors)
    stages = {build.digest: build.stage for build in distinct_stages(plan, denoiser)}

    def build(order: Any) -> dict[str, str]:
        digest, name = order
        try:
            if digest not in stages:
                raise RuntimeError(f"the capture in this process has no graph {digest[:12]}, the first one had it")
            job = Job(stage=stages[digest], folder=folder, name=name, target=target, weights=OnnxWeights(folder))
            return {"file": str(backend.build(job))}
        except HybridiffError as error:
            return {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            return {"error": f"a stage cannot be compiled: {type(error).__name__}: {str(error).splitlines()[0]}"}

    return build


if __name__ == "__main__":
    main()
