"""How long one step takes under a pattern, from measured stage times and links."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ..ir import WHOLE, Branch, InputError, LeafSpec, Pattern, Profile, Segment, lower

__all__ = ["StepCost", "segment_seconds", "step_cost"]

_SAMPLE_NAMES = ("sample", "hidden_states", "x", "latents")
_ITEM_BYTES = {
    "float64": 8, "int64": 8, "complex64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2,
}


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of one step."""

    ideal_s: float
    """Measured stage times alone: the slowest rank, without communication and overhead."""
    latency_s: float
    """What a step is predicted to take: stage times, exposed communication and the driver's overhead."""


def step_cost(profile: Profile, pattern: Pattern) -> StepCost:
    """Time of a step of `pattern` in the long run (steps of the same pattern before and after it).

    The segments of `lower(pattern)` run in order, each when its rank is free and its fresh reads are there. For the
    prediction, ranks other than 0 first receive the sample from rank 0, fresh reads travel, and estimates return to
    rank 0, over the profile's links (none measured: free). Stale values travel while the driver does its work outside
    the denoiser, so only what takes longer than `Costs.step_overhead_s` shows. O(segments^2).

    Raises:
        InputError: the profile has no costs for a segment.
    """
    ideal = _makespan(profile, pattern, moving=False)
    overhead = profile.costs.step_overhead_s
    hidden = max(0.0, _stale_seconds(profile, pattern) - overhead)
    return StepCost(ideal_s=ideal, latency_s=_makespan(profile, pattern, moving=True) + hidden + overhead)


def segment_seconds(profile: Profile, segment: Segment, stages: int) -> float:
    """Time of one segment of a partition with `stages` stages: measured, else the sum of its layers.

    Raises:
        InputError: neither was measured.
    """
    costs, batch = profile.costs, len(segment.branches)
    measured = costs.stage_seconds(segment.partition, segment.stages, batch)
    if measured is None and len(segment.stages) == stages:
        measured = costs.stage_seconds(WHOLE, (0,), batch)
    if measured is not None:
        return measured
    if batch not in costs.layers and 1 not in costs.layers:
        raise InputError(
            f"the profile has no layer costs for 1 branch (it has {sorted(costs.layers)}); profile the model again"
        )
    per_layer, times = (costs.layers[batch], 1) if batch in costs.layers else (costs.layers[1], batch)
    inside = set(_layers(profile, segment.partition, segment.stages))
    return times * math.fsum(s for name, s in zip(profile.graph.names, per_layer) if name in inside)


def _makespan(profile: Profile, pattern: Pattern, *, moving: bool) -> float:
    """When the last rank is done and, with `moving`, the last estimate has reached rank 0."""
    sample = _sample_bytes(profile) if moving else 0
    clock: dict[int, float] = {}
    done: dict[tuple[Branch, int], tuple[float, int]] = {}
    latest = 0.0
    for segment in lower(pattern):
        rank = segment.rank
        if rank not in clock:
            clock[rank] = _link_seconds(profile, 0, rank, sample) if moving else 0.0
        start = clock[rank]
        for reads in segment.reads:
            for read in reads:
                if not read.stale:
                    ready, source = done[read.branch, read.stage]
                    nbytes = _cut_bytes(profile, pattern, read.stage, segment.stages) if moving else 0
                    start = max(start, ready + (_link_seconds(profile, source, rank, nbytes) if moving else 0.0))
        end = start + segment_seconds(profile, segment, pattern.stages)
        clock[rank] = end
        for branch in segment.branches:
            for stage in segment.stages:
                done[branch, stage] = (end, rank)
        if moving and segment.has_estimate:
            end += _link_seconds(profile, rank, 0, sample * len(segment.branches))
        latest = max(latest, end)
    return latest


def _stale_seconds(profile: Profile, pattern: Pattern) -> float:
    """Slowest transfer between two ranks of what the next step of `pattern` reads stale."""
    moved: dict[tuple[int, int], int] = defaultdict(int)
    for segment in lower(pattern):
        for reads in segment.reads:
            for read in reads:
                producer = pattern.unit(read.branch, read.stage)
                if read.stale and producer is not None and producer.rank != segment.rank:
                    moved[producer.rank, segment.rank] += _cut_bytes(profile, pattern, read.stage, segment.stages)
    return max((_link_seconds(profile, *ranks, nbytes) for ranks, nbytes in moved.items()), default=0.0)


def _link_seconds(profile: Profile, source: int, target: int, nbytes: int) -> float:
    if source == target or nbytes == 0:
        return 0.0
    for link in profile.costs.links:
        if (link.source, link.target) == (source, target):
            return link.latency_s + nbytes / link.bytes_per_s
    return 0.0


def _cut_bytes(profile: Profile, pattern: Pattern, source: int, targets: tuple[int, ...]) -> int:
    producers = _layers(profile, pattern.partition, (source,))
    consumers = _layers(profile, pattern.partition, targets)
    return sum(value.nbytes for value in profile.graph.crossing(producers, consumers))


def _layers(profile: Profile, partition: str, stages: Iterable[int]) -> list[str]:
    return [name for stage in stages for name in profile.partition(partition).stages[stage]]


def _sample_bytes(profile: Profile) -> int:
    """Bytes of one branch's latents, which are those of its estimate too."""
    tensors = [leaf for leaf in profile.model.signature.leaves if leaf.shape is not None]
    for name in _SAMPLE_NAMES:
        for leaf in tensors:
            if leaf.path == name:
                return _leaf_bytes(leaf)
    return max((_leaf_bytes(leaf) for leaf in tensors), default=0)


def _leaf_bytes(leaf: LeafSpec) -> int:
    return math.prod(leaf.shape or ()) * _ITEM_BYTES.get(leaf.dtype or "", 4)
