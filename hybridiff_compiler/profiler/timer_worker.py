"""A process that builds and times graphs: `python -m hybridiff_compiler.profiler.timer_worker`.

Started by `timers.ProcessTimers` and nobody else; it lives as long as its standard input.
"""

from __future__ import annotations

import json
import os
import pickle
import traceback
from typing import Any

import torch
import torch.multiprocessing  # knows how to open shared tensors

from ..ir import CallSignature
from ..runtime.handover import unpack_skeleton
from ..runtime.processes import read_frame, write_frame
from .jobs import GraphBuilder, Job, Sampler

__all__ = ["main"]

_STDIN = 0


def main() -> None:
    """Take the denoiser, then answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever compilers print must not end up among the answers
    try:
        head, skeleton, shared = json.loads(read_frame(_STDIN)), read_frame(_STDIN), read_frame(_STDIN)
        request = json.loads(read_frame(_STDIN))
        builder: GraphBuilder | None = None
        samplers: dict[str, Sampler] = {}
        while True:
            try:
                answer: dict[str, Any] = {}
                if request["do"] == "load":
                    builder = _load(head, skeleton, shared)
                elif request["do"] == "build":
                    assert builder is not None
                    samplers[request["key"]] = builder.sampler(Job.model_validate(request["job"]))
                else:
                    with torch.no_grad():
                        answer["seconds"] = samplers[request["key"]]()
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {str(error).strip()[:1000]}"}
            write_frame(answers, json.dumps(answer).encode())
            request = json.loads(read_frame(_STDIN))
    except (EOFError, BrokenPipeError):
        return


def _load(head: dict[str, Any], skeleton: bytes, shared: bytes) -> GraphBuilder:
    device = torch.device(head["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if head["threads"] is not None:
        torch.set_num_threads(head["threads"])
    tensors = pickle.loads(shared)  # noqa: S301 - from our own parent
    denoiser, weights = unpack_skeleton(skeleton, device, tensors)
    inputs: dict[Any, dict[str, torch.Tensor]] = {}
    for (branch, path), leaf in zip(head["leaves"], tensors[len(weights):], strict=True):
        inputs.setdefault(branch, {})[path] = leaf
    return GraphBuilder(denoiser, CallSignature.model_validate(head["signature"]), inputs)


if __name__ == "__main__":
    main()
