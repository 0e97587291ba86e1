"""How far the speed of a machine wanders while something is profiled on it.

Samples that are taken within seconds agree better with each other than with those of another minute: clocks change, and
other guests of a shared host come and go. What two profiles differ by is such drift, so it belongs to what a profile
states as its spread.
"""

from __future__ import annotations

import math
import statistics
import threading
import time

from .jobs import Sampler

__all__ = ["Drift"]

_EVERY_S = 4.0
_SAMPLES = 3
_PAIRS = 1.96 * math.sqrt(2)
"""Standard deviations within which 95 % of the differences of two normally distributed values lie."""


class Drift:
    """Times of one graph, taken every few seconds while other things are measured."""

    def __init__(self, sampler: Sampler, seconds: list[float]) -> None:
        """
        Args:
            sampler: of the graph; it returns one time.
            seconds: times taken before, to which those taken here are added.
        """
        self._sampler, self._owner, self._last = sampler, threading.current_thread(), 0.0
        self._seconds = seconds

    def look(self) -> None:
        """Take a time, unless it is too soon or somebody else's thread asks."""
        if threading.current_thread() is self._owner and time.monotonic() - self._last >= _EVERY_S:
            self._sampler()  # brings what the graph reads back into caches
            self._seconds.append(statistics.median(self._sampler()[0] for _ in range(_SAMPLES)))
            self._last = time.monotonic()

    @property
    def spread(self) -> float:
        """What 19 of 20 pairs of such times, taken long apart, differ by at most, over their mean."""
        if len(self._seconds) < 2:
            return 0.0
        return _PAIRS * statistics.stdev(self._seconds) / statistics.fmean(self._seconds)
