"""Backends: stage graph -> executable. One file each; `compile_stage` picks by name.

`BACKENDS` compile in the process that runs. The backends of `artifact.py` build files, which `hybridiff compile`
gathers in a bundle; `bundle.open_graphs` loads executables from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..capture import StageGraph
from ..ir import UsageError
from . import eager, inductor

__all__ = ["BACKENDS", "LAZY", "compile_stage"]

BACKENDS: dict[str, Callable[[StageGraph], Callable[..., Sequence[Tensor]]]] = {
    "eager": eager.compile_stage,
    "inductor": inductor.compile_stage,
}
"""Name -> compiler of one stage graph."""

LAZY = frozenset({"inductor"})
"""Backends whose executables are compiled by their first call, and found in a cache on disk by later processes."""


def compile_stage(stage: StageGraph, backend: str) -> Callable[..., Sequence[Tensor]]:
    """An executable with the calling convention of `StageGraph.module`.

    Args:
        stage: the graph.
        backend: one of `BACKENDS`.

    Raises:
        UsageError: unknown backend.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}; allowed are {', '.join(BACKENDS)}")
    return BACKENDS[backend](stage)
