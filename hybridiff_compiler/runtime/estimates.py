"""The pair of estimates of a step, made from what was computed and what is remembered."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..ir import BRANCHES, Branch, Combine

__all__ = ["EstimateMemory"]


class EstimateMemory:
    """Holds the last guided pair and the last pair of which both branches were computed (for the guidance delta).

    A mirrored pair is not remembered: repeating it would repeat the loss of guidance, which costs far more than the few
    steps by which the guided pair is older, and what a step costs is predicted from that pair's age.

    Lives on the driver only: workers never need it.
    """

    def __init__(self) -> None:
        self._last: dict[Branch, Tensor] | None = None
        self._guided: dict[Branch, Tensor] | None = None

    def reset(self) -> None:
        """Forget everything (a generation begins)."""
        self._last = self._guided = None

    def preset(self, pair: Mapping[Branch, Tensor]) -> None:
        """Remember `pair` as if an exact step had just computed it."""
        self._last = self._guided = dict(pair)

    def pair(self, combine: Combine, computed: Mapping[Branch, Tensor]) -> dict[Branch, Tensor]:
        """The step's pair of estimates; `computed` holds the branches that were evaluated."""
        if combine is Combine.CFG:
            self._guided = {branch: computed[branch] for branch in BRANCHES}
            self._last = self._guided
        elif combine is Combine.MIRROR:
            (estimate,) = computed.values()
            return {branch: estimate for branch in BRANCHES}
        elif combine is Combine.DELTA:
            ((branch, estimate),) = computed.items()
            assert self._guided is not None, "validated schedules compute both branches before using their difference"
            other = BRANCHES[1 - BRANCHES.index(branch)]
            self._last = {branch: estimate, other: estimate + (self._guided[other] - self._guided[branch])}
        assert self._last is not None, "validated schedules compute a pair before repeating it"
        return self._last
