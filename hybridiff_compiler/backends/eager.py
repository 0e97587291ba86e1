"""The stage graph as it is: every operation launched by Python. The reference for all other backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..capture import StageGraph

__all__ = ["compile_stage"]


def compile_stage(stage: StageGraph) -> Callable[..., Sequence[Tensor]]:
    """The generated Python code of the graph."""
    call: Callable[..., Sequence[Tensor]] = stage.module
    return call
