"""torch.compile with static shapes: fused kernels, compiled at the first call.

Before that, what compilers do not do by themselves: linear layers are merged, and what need not be computed at every
step is taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..capture import StageGraph
from .hoisting import Hoisted, hoist
from .merging import merge_linears

__all__ = ["compile_stage"]


def compile_stage(stage: StageGraph) -> Callable[..., Sequence[Tensor]]:
    """A compiled version of the graph; the first call compiles it.

    Parameters of the denoiser may move in memory (see `merging`), with the same values.
    """
    merged = merge_linears(stage).stage
    parts = hoist(merged)
    return _compiled(merged) if parts is None else Hoisted.build(parts, _compiled)


def _compiled(stage: StageGraph) -> Callable[..., Sequence[Tensor]]:
    call: Callable[..., Sequence[Tensor]] = torch.compile(stage.module, fullgraph=True, dynamic=False)
    return call
