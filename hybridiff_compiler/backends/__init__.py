"""Backends: stage graph -> executable. One file each; `compile_stage` picks by name.

`BACKENDS` compile in the process that runs. The backends of `artifact.py` build files, which `hybridiff compile`
gathers in a bundle; executables from a bundle are had by `Bundle.backend` in place of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..capture import StageGraph
from ..ir import UsageError
from . import eager, inductor

__all__ = ["BACKENDS", "compile_stage"]

BACKENDS: dict[str, Callable[[StageGraph], Callable[..., Sequence[Tensor]]]] = {
    "eager": eager.compile_stage,
    "inductor": inductor.compile_stage,
}
"""Name -> compiler of one stage graph."""


def compile_stage(stage: StageGraph, backend: str) -> Callable[..., Sequence[Tensor]]:
    """An executable with the calling convention of `StageGraph.module`.

    Args:
        stage: the graph.
        backend: one of `BACKENDS`, or the `backend` of an opened bundle.

    Raises:
        UsageError: unknown backend.
        InputError: the bundle is damaged or was not made for this graph.
    """
    if backend.startswith("bundle:"):
        from ..bundle import load_executable

        return load_executable(stage, backend)
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}; allowed are {', '.join(BACKENDS)}")
    return BACKENDS[backend](stage)
