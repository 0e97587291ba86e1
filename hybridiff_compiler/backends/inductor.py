"""torch.compile with static shapes: fused kernels, compiled at the first call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..capture import StageGraph

__all__ = ["compile_stage"]


def compile_stage(stage: StageGraph) -> Callable[..., Sequence[Tensor]]:
    """A compiled version of the graph; the first call compiles it."""
    call: Callable[..., Sequence[Tensor]] = torch.compile(stage.module, fullgraph=True, dynamic=False)
    return call
