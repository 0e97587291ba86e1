"""What exact generations show step by step: how far the branches disagree, and how much values change."""

from __future__ import annotations

from .data import Data

__all__ = ["Guidance", "Redundancy"]


class Guidance(Data):
    """Denoising discrepancy m_i = mean|eps_c - eps_u| / mean|eps_u| of every step (METHOD.md, "rel-MAE")."""

    rel_mae: tuple[tuple[float, ...], ...]
    """Per prompt, per step."""
    scale: float | None = None
    """Guidance scale of the generations; None: that of the profile."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean over prompts, per step."""
        return tuple(sum(column) / len(column) for column in zip(*self.rel_mae))

    def quantile(self, share: float) -> tuple[float, ...]:
        """Per step, the value that `share` of the prompts (0 to 1) do not exceed, interpolated linearly."""
        result = []
        for column in zip(*self.rel_mae):
            ordered = sorted(column)
            position = share * (len(ordered) - 1)
            low = min(int(position), len(ordered) - 1)
            high = min(low + 1, len(ordered) - 1)
            result.append(ordered[low] + (position - low) * (ordered[high] - ordered[low]))
        return tuple(result)

    @property
    def curvature(self) -> tuple[float, ...]:
        """Second difference `m[i+1] - 2 m[i] + m[i-1]` of the mean, per step; 0 at both ends."""
        mean = self.mean
        inner = [mean[i + 1] - 2 * mean[i] + mean[i - 1] for i in range(1, len(mean) - 1)]
        return (0.0, *inner, 0.0)[: len(mean)]

    def tau1(self, history: int, eps: float, cap: int) -> tuple[int, ...]:
        """Per prompt, the step at which the discrepancy has flattened (METHOD.md, "Switching rule").

        Args:
            history: L, how many steps the slope spans.
            eps: slope under which the curve counts as flat.
            cap: the result when that does not happen before step `cap`.
        """
        return tuple(_flattened(curve, history, eps, cap) for curve in self.rel_mae)


def _flattened(curve: tuple[float, ...], history: int, eps: float, cap: int) -> int:
    for step in range(history, min(len(curve), cap)):
        if 0 <= (curve[step - history + 1] - curve[step]) / history < eps:
            return step
    return cap


class Redundancy(Data):
    """Temporal redundancy: how much the values between layers change from step to step.

    Those that partitions cut are read one step old in cheap steps, so the partitioner prefers cuts of what changes
    little (`planner.crossing.lost_across`).
    """

    change: dict[str, tuple[float, ...]]
    """Per value, per step from the second on: mean |value - its value a step before| over the mean |value| of the step
    before, over both branches; of values that partitions cut over all prompts, of others over the few that are
    surveyed before partitions are chosen. Profiles from before that survey hold the former alone."""

    @property
    def mean(self) -> dict[str, float]:
        """Mean over steps by value: what a cut there costs in staleness. Small values tolerate it."""
        return {name: sum(row) / len(row) for name, row in self.change.items() if row}
