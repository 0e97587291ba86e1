"""A builder process: `python -m hybridiff_compiler.bundle.builder`, started by `builders.py` and nobody else."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from ..backends.artifact import Job, artifact_backend
from ..backends.onnx_weights import OnnxWeights
from ..backends.target import Target
from ..ir import HybridiffError, Plan
from ..runtime.handover import unpack_skeleton
from ..runtime.processes import read_frame
from .writing import distinct_stages

__all__ = ["main"]

_STDIN = 0


def main() -> None:
    """Take the denoiser, then compile one graph per order until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever compilers print must not end up among the answers
    try:
        start, skeleton = json.loads(read_frame(_STDIN)), read_frame(_STDIN)
        _serve(start, skeleton, answers)
    except EOFError:
        return


def _serve(start: dict[str, str], skeleton: bytes, answers: TextIO) -> None:
    torch.set_num_threads(int(start["threads"]))
    device = torch.device(start["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    plan = Plan.parse(start["plan"], source="plan from the parent")
    backend, target = artifact_backend(start["backend"]), Target.model_validate_json(start["target"])
    folder = Path(start["folder"])
    denoiser, tensors = unpack_skeleton(skeleton, device)
    with torch.no_grad():
        for tensor in tensors:
            _scramble(tensor)
    stages = {build.digest: build.stage for build in distinct_stages(plan, denoiser)}
    while True:
        digest, name = json.loads(read_frame(_STDIN))
        try:
            if digest not in stages:
                raise RuntimeError(f"the capture in this process has no graph {digest[:12]}, the first one had it")
            job = Job(stage=stages[digest], folder=folder, name=name, target=target, weights=OnnxWeights(folder))
            answer = {"file": str(backend.build(job))}
        except HybridiffError as error:
            answer = {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"a stage cannot be compiled: {type(error).__name__}: {str(error).splitlines()[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _scramble(tensor: Tensor) -> None:
    """Values that no compiler can make anything of."""
    if tensor.is_floating_point():
        tensor.normal_()
    elif tensor.dtype == torch.bool:
        tensor.copy_(torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape) % 2 == 1)
    elif not tensor.is_complex():
        tensor.random_(0, 2)


if __name__ == "__main__":
    main()
