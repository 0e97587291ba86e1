"""The pair of estimates of a step, made from what was computed and what is remembered."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..ir import BRANCHES, Branch, Combine, Pattern

__all__ = ["EstimateMemory"]

Pair = Mapping[Branch, Tensor]


class EstimateMemory:
    """Holds the last guided pair, the last pair of which both branches were computed (for the guidance delta), and the
    pairs of the last two exact steps (for trends).

    A mirrored pair is not remembered: repeating it would repeat the loss of guidance, which costs far more than the few
    steps by which the guided pair is older, and what a step costs is predicted from that pair's age. Trends are drawn
    through exact pairs alone: a line magnifies what errors its two points have.

    Lives on the driver only: workers never need it.
    """

    def __init__(self) -> None:
        self._last: dict[Branch, Tensor] | None = None
        self._guided: dict[Branch, Tensor] | None = None
        self._exact: list[tuple[int, dict[Branch, Tensor]]] = []

    def reset(self) -> None:
        """Forget everything (a generation begins)."""
        self._last = self._guided = None
        self._exact.clear()

    def preset(self, pair: Pair, step: int = 0) -> None:
        """Remember `pair` as if an exact step had just computed it."""
        self._last = self._guided = dict(pair)
        self._exact = [*self._exact[-1:], (step, self._guided)]

    def pair(self, pattern: Pattern, computed: Pair, step: int) -> dict[Branch, Tensor]:
        """The pair of estimates of `step`, run by `pattern`; `computed` holds the branches that were evaluated."""
        combine = pattern.combine
        if combine is Combine.CFG:
            self._guided = {branch: computed[branch] for branch in BRANCHES}
            self._last = self._guided
            if pattern.is_exact:
                self._exact = [*self._exact[-1:], (step, self._guided)]
        elif combine is Combine.MIRROR:
            (estimate,) = computed.values()
            return {branch: estimate for branch in BRANCHES}
        elif combine is Combine.DELTA:
            ((branch, estimate),) = computed.items()
            assert self._guided is not None, "validated schedules compute both branches before using their difference"
            other = BRANCHES[1 - BRANCHES.index(branch)]
            self._last = {branch: estimate, other: estimate + (self._guided[other] - self._guided[branch])}
        elif pattern.trend:
            return self._extrapolated(pattern.trend, step)
        assert self._last is not None, "validated schedules compute a pair before repeating it"
        return self._last

    def _extrapolated(self, trend: float, step: int) -> dict[Branch, Tensor]:
        assert len(self._exact) == 2, "validated schedules have two exact steps before a trend"
        (before, first), (last, second) = self._exact
        weight = trend * (step - last) / (last - before)
        return {branch: second[branch] + weight * (second[branch] - first[branch]) for branch in BRANCHES}
