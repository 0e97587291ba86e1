"""How long one step takes under a pattern, from measured stage times and links."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ..ir import (
    WHOLE,
    Branch,
    InputError,
    Partition,
    Pattern,
    Profile,
    RankSpec,
    Segment,
    UsageError,
    lower,
)
from .crossing import stage_bytes
from .memory import latent_bytes

__all__ = ["CostModel", "Launch", "StepCost", "segment_seconds", "step_cost"]


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of one step."""

    ideal_s: float
    """Measured stage times alone: the slowest rank, without communication and overhead."""
    latency_s: float
    """What a step is predicted to take: stage times, exposed communication and the driver's overhead."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """When one segment of a step runs; seconds since the step began."""

    segment: Segment
    start_s: float
    end_s: float
    back_s: float
    """When its estimate is on rank 0; if it has none, its end."""


class CostModel:
    """Step costs of one profile on given ranks; remembers what patterns over the same partitions share."""

    def __init__(self, profile: Profile, ranks: Sequence[RankSpec] | None = None, *, overlap: bool = True) -> None:
        """
        Args:
            profile: measurements.
            ranks: the ranks, whose `speed` divides the measured times; default: as many as wanted, all as profiled.
            overlap: whether stale values travel while the driver does its work outside the denoiser, so that only
                what takes longer than `Costs.step_overhead_s` shows; otherwise their whole transfer does.
        """
        self._profile, self._overlap = profile, overlap
        self._speeds = None if ranks is None else [rank.speed for rank in ranks]
        self._links = {(link.source, link.target): link for link in profile.costs.links}
        self._known = {rank for pair in self._links for rank in pair}
        self._partitions = {p.name: p for p in profile.partitions} | {WHOLE: Partition.whole(profile.graph)}
        self._measured = {(c.partition, c.stages, c.batch): c.seconds for c in reversed(profile.costs.stages)}
        self._sample = latent_bytes(profile.model.signature)
        self._seconds: dict[tuple[str, tuple[int, ...], int], float] = {}
        self._between: dict[str, dict[tuple[int, int], int]] = {}
        self._fused: dict[tuple[str, int, tuple[int, ...]], int] = {}

    def step(self, pattern: Pattern) -> StepCost:
        """Time of a step of `pattern` in the long run (steps of the same pattern before and after it).

        The segments of `lower(pattern)` run in order, each when its rank is free and its fresh reads are there. For
        the prediction, ranks other than 0 first receive the sample from rank 0, fresh reads travel, and estimates
        return to rank 0, each pair of ranks over its own link (none measured: free; with ranks that the profile did
        not measure: as over the slowest link that it did). O(segments x stages).

        Raises:
            InputError: the profile has no costs for a segment.
            UsageError: the pattern needs more ranks than there are.
        """
        if self._speeds is not None and pattern.world_size > len(self._speeds):
            raise UsageError(f"pattern {pattern.name!r} needs {pattern.world_size} ranks, got {len(self._speeds)}")
        overhead = self._profile.costs.step_overhead_s
        stale = self._stale_seconds(pattern)
        shown = max(0.0, stale - overhead) if self._overlap else stale
        latency = self._makespan(pattern, moving=True) + shown + overhead
        return StepCost(ideal_s=self._makespan(pattern, moving=False), latency_s=latency)

    def segment_seconds(self, segment: Segment, stages: int) -> float:
        """Time of one segment of a partition with `stages` stages on its rank: measured, else the sum of its layers.

        Raises:
            InputError: neither was measured.
        """
        key = (segment.partition, segment.stages, len(segment.branches))
        if key not in self._seconds:
            self._seconds[key] = self._profiled_seconds(*key, whole=len(segment.stages) == stages)
        return self._seconds[key] / (1.0 if self._speeds is None else self._speeds[segment.rank])

    def _profiled_seconds(self, partition: str, stages: tuple[int, ...], batch: int, *, whole: bool) -> float:
        costs = self._profile.costs
        measured = self._measured.get((partition, stages, batch))
        if measured is None and whole:
            measured = self._measured.get((WHOLE, (0,), batch))
        if measured is not None:
            return measured
        if batch not in costs.layers and 1 not in costs.layers:
            raise InputError(
                f"the profile has no layer costs for 1 branch (it has {sorted(costs.layers)}); profile the model again"
            )
        per_layer, times = (costs.layers[batch], 1) if batch in costs.layers else (costs.layers[1], batch)
        inside = set(self._partitions[partition].evaluated(stages))
        return times * math.fsum(s for name, s in zip(self._profile.graph.names, per_layer) if name in inside)

    def _makespan(self, pattern: Pattern, *, moving: bool) -> float:
        """When the last rank is done and, with `moving`, the last estimate has reached rank 0."""
        return max((launch.back_s for launch in self.launches(pattern, moving=moving)), default=0.0)

    def launches(self, pattern: Pattern, *, moving: bool = True) -> list[Launch]:
        """When the segments of a step run, in the order of `lower(pattern)`.

        Args:
            pattern: of the step.
            moving: whether what is sent takes time.

        Raises:
            InputError: the profile has no costs for a segment.
        """
        clock: dict[int, float] = {}
        done: dict[tuple[Branch, int], tuple[float, int]] = {}
        result = []
        for segment in lower(pattern):
            rank = segment.rank
            if rank not in clock:
                clock[rank] = self._link_seconds(0, rank, self._sample) if moving else 0.0
            start = clock[rank]
            for reads in segment.reads:
                for read in reads:
                    if read.fresh:
                        ready, source = done[read.branch, read.stage]
                        nbytes = self._cut_bytes(pattern.partition, read.stage, segment.stages) if moving else 0
                        start = max(start, ready + self._link_seconds(source, rank, nbytes))
            end = start + self.segment_seconds(segment, pattern.stages)
            clock[rank] = end
            for branch in segment.branches:
                for stage in segment.stages:
                    done[branch, stage] = (end, rank)
            sent = self._sample * len(segment.branches) if moving and segment.has_estimate else 0
            back = end + self._link_seconds(rank, 0, sent)
            result.append(Launch(segment=segment, start_s=start, end_s=end, back_s=back))
        return result

    def _stale_seconds(self, pattern: Pattern) -> float:
        """Slowest transfer between two ranks of what the next step of `pattern` reads stale."""
        moved: dict[tuple[int, int], int] = defaultdict(int)
        producers = {(unit.branch, unit.stage): unit.rank for unit in pattern.units}
        for segment in lower(pattern):
            for reads in segment.reads:
                for read in reads:
                    source = producers.get((read.branch, read.stage))
                    if read.stale and source is not None and source != segment.rank:
                        moved[source, segment.rank] += self._cut_bytes(pattern.partition, read.stage, segment.stages)
        return max((self._link_seconds(*ranks, nbytes) for ranks, nbytes in moved.items()), default=0.0)

    def _link_seconds(self, source: int, target: int, nbytes: int) -> float:
        if source == target or nbytes == 0 or not self._links:
            return 0.0
        link = self._links.get((source, target))
        if link is not None:
            return link.seconds(nbytes)
        if {source, target} <= self._known:
            return 0.0
        return max(known.seconds(nbytes) for known in self._links.values())

    def _cut_bytes(self, partition: str, source: int, targets: tuple[int, ...]) -> int:
        """Bytes that `targets`, evaluated as one graph, take from stage `source`."""
        if len(targets) == 1:
            if partition not in self._between:
                self._between[partition] = stage_bytes(self._profile.graph, self._partitions[partition])
            return self._between[partition].get((source, targets[0]), 0)
        key = (partition, source, targets)
        if key not in self._fused:
            values = self._partitions[partition].received(self._profile.graph, source, targets)
            self._fused[key] = sum(value.nbytes for value in values)
        return self._fused[key]


def step_cost(
    profile: Profile, pattern: Pattern, ranks: Sequence[RankSpec] | None = None, *, overlap: bool = True
) -> StepCost:
    """Time of one step: `CostModel.step` for a single pattern.

    Raises:
        InputError: the profile has no costs for a segment.
        UsageError: the pattern needs more ranks than there are.
    """
    return CostModel(profile, ranks, overlap=overlap).step(pattern)


def segment_seconds(profile: Profile, segment: Segment, stages: int) -> float:
    """Time of one segment on a rank as profiled: `CostModel.segment_seconds`.

    Raises:
        InputError: neither the segment nor its layers were measured.
    """
    return CostModel(profile).segment_seconds(segment, stages)
