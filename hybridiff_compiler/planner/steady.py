"""Among contiguous stages that are all fast enough, the cuts that lose least: the second half of a choice.

Stages of a cheap step read each other one step old. Cuts whose stages take about equally long are therefore told apart
by what they would lose: the bytes that cross, weighed by how much they change in a step (`crossing.change_weights`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["steadiest_cuts"]


def steadiest_cuts(
    times: Sequence[NDArray[np.float64]], losses: Sequence[NDArray[np.int64]], bound: float, last: int
) -> list[int]:
    """Borders of contiguous stages, none slower than `bound`, with the least sum of losses; of equals the earliest.

    A stage's time and loss depend on its two borders only, so `L[k, b] = min over a of L[k-1, a] + loss_k[a, b)`, over
    the runs whose time is within the bound, is exact; O(stages x layers^2).

    Args:
        times: per stage, `[i, j]`: seconds that it takes with the layers `[i, j)`; infinite where it cannot have them.
        losses: per stage, `[i, j]`: what it loses by reading what it receives one step old.
        bound: seconds; some division is within it.
        last: position of the output layer, which is in the last stage.

    Returns:
        As many borders as there are stages, and one more: 0 first, the number of layers last.
    """
    size, stages = times[0].shape[0] - 1, len(times)
    best = np.full((stages + 1, size + 1), np.inf)
    origin = np.zeros((stages + 1, size + 1), dtype=np.int64)
    best[0, 0] = 0.0
    start, end = np.indices((size + 1, size + 1))
    for stage in range(1, stages + 1):
        ends_right = (start <= last) & (end == size) if stage == stages else end <= last
        fits = (start < end) & ends_right & (times[stage - 1] <= bound * (1 + 1e-12))
        total = np.where(fits, best[stage - 1][:, None] + losses[stage - 1], np.inf)
        origin[stage] = total.argmin(axis=0)
        best[stage] = total.min(axis=0)
    cuts = [size]
    for stage in range(stages, 0, -1):
        cuts.append(int(origin[stage, cuts[-1]]))
    return cuts[::-1]
