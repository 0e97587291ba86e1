"""torch.compile with static shapes: fused kernels, compiled at the first call.

Two variants. `inductor` reads the weights wherever they are. `inductor-frozen` takes them for constants: convolution
weights are laid out once as the kernels want them (else that is done in every call), and projections of one input are
joined to one matrix product. It needs memory for what it lays out anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..capture import StageGraph

__all__ = ["compile_stage", "compile_stage_frozen"]


def compile_stage(stage: StageGraph) -> Callable[..., Sequence[Tensor]]:
    """A compiled version of the graph; the first call compiles it."""
    call: Callable[..., Sequence[Tensor]] = torch.compile(stage.module, fullgraph=True, dynamic=False)
    return call


def compile_stage_frozen(stage: StageGraph) -> Callable[..., Sequence[Tensor]]:
    """A compiled version of the graph with its weights as they are at the first call, which compiles it."""
    call: Callable[..., Sequence[Tensor]] = torch.compile(
        stage.module.eval(), fullgraph=True, dynamic=False, options={"freezing": True}
    )
    return call
