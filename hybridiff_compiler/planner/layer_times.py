"""What every partitioner checks first: layer times, slack, and which runs of layers may be inner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..ir import LayerGraph, UsageError

__all__ = ["check_costs", "check_slack", "inner_runs"]


def check_costs(graph: LayerGraph, costs: Sequence[float]) -> NDArray[np.float64]:
    """Layer times as an array, in seconds.

    Raises:
        UsageError: not one finite time of 0 or more per layer.
    """
    seconds = np.asarray(costs, dtype=float)
    if seconds.shape != (len(graph.layers),):
        raise UsageError(f"got costs of {seconds.size} layers, the graph has {len(graph.layers)}; give one per layer")
    if not np.isfinite(seconds).all() or (seconds < 0).any():
        raise UsageError("layer costs must be finite and not negative, in seconds")
    return seconds


def check_slack(slack: float) -> float:
    """`slack` itself.

    Raises:
        UsageError: it is negative.
    """
    if slack < 0:
        raise UsageError(f"got slack {slack:g}; it is a fraction of 0 or more")
    return slack


def inner_runs(graph: LayerGraph) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """`[i, j]`: which runs `[i, j)` may be inner; first without layers that read the denoiser's inputs, then with.

    Neither holds empty runs nor runs with the output layer.
    """
    size = len(graph.layers)
    fed = {consumer for value in graph.values for consumer in value.consumers}
    is_output = np.array([name == graph.output for name in graph.names])
    is_input = np.array([name not in fed for name in graph.names])
    start, end = np.indices((size + 1, size + 1))

    def without(layers: NDArray[np.bool_]) -> NDArray[np.bool_]:
        count = np.concatenate([[0], np.cumsum(layers)])
        return count[end] == count[start]

    allowed = (start < end) & without(is_output)
    return allowed & without(is_input), allowed
