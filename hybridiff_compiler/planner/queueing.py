"""Images that arrive at random and wait for a free group of GPUs: a discrete-event simulation of the M/D/c queue.

Arrivals are a Poisson process, every image takes equally long (a plan's latency does not depend on the prompt), groups
are alike and take images in order of arrival. Then the k-th arrival is always served by group k mod c, so each group is
a queue of its own in which image n starts at `max(arrival_n, start_(n-1) + service)` (Lindley's recursion), which a
running maximum solves for all images at once. O(images).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..ir import UsageError

__all__ = ["Queue", "simulate_queue"]

_WARM_UP = 0.1


@dataclass(frozen=True, eq=False)
class Queue:
    """What a simulation showed, the first tenth left out."""

    utilisation: float
    """Share of the time that a group works, as offered: rate x service / groups."""
    response_s: NDArray[np.float64]
    """Per image: from arrival to finished, waiting included."""
    service_s: float

    @property
    def mean_wait_s(self) -> float:
        """Mean time from arrival to start."""
        return float(self.response_s.mean()) - self.service_s

    def percentile_s(self, percentile: float) -> float:
        """Time within which so many percent of the images are finished."""
        return float(np.percentile(self.response_s, percentile))


def simulate_queue(service_s: float, groups: int, rate: float, *, images: int = 200_000, seed: int = 0) -> Queue:
    """Serve `images` arrivals.

    Args:
        service_s: time of one image.
        groups: how many images are made side by side.
        rate: mean arrivals per second; below `groups / service_s`, or the queue grows without end.
        images: arrivals to simulate.
        seed: of the arrival times; equal seeds give equal results.

    Raises:
        UsageError: an argument is out of range, or the load is 1 or more.
    """
    if not (service_s > 0 and groups >= 1 and rate > 0 and images >= 10):
        raise UsageError(
            f"got service {service_s} s, {groups} groups, {rate} images/s and {images} images; all must be above 0, "
            "and 10 images or more"
        )
    load = rate * service_s / groups
    if load >= 1:
        raise UsageError(
            f"{rate:g} images/s are more than {groups} groups of {service_s:.3g} s can make "
            f"({groups / service_s:.3g}/s)"
        )
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, images))
    response = np.empty(images)
    for group in range(groups):
        mine = arrivals[group::groups]
        offset = service_s * np.arange(len(mine))
        start = offset + np.maximum.accumulate(mine - offset)
        response[group::groups] = start + service_s - mine
    return Queue(load, response[int(images * _WARM_UP) :], service_s)
