"""Lowering of a pattern table: which stage sets run as one graph, where, and in which order.

Units of one branch on one rank that read each other fresh are fused into a *segment* (the whole denoiser, when all
stages are there): that is the only way to run a nested split exactly, and it saves graph launches. Two segments of one
rank that cover the same stages for the two branches with the same kinds of reads run as one *batch*, as diffusers'
batched guidance does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import networkx as nx

from .errors import InputError
from .pattern import BRANCHES, Branch, Pattern, Read, Unit

__all__ = ["Segment", "lower"]


@dataclass(frozen=True)
class Segment:
    """One graph launch of a step: a set of stages for one branch, or for both batched together."""

    partition: str
    stages: tuple[int, ...]
    """Sorted stage indices, evaluated as one graph."""
    branches: tuple[Branch, ...]
    """One branch, or both (`BRANCHES`) batched along dimension 0."""
    rank: int
    reads: tuple[tuple[Read, ...], ...]
    """Per branch of `branches`: the read of every stage outside `stages`, sorted by stage."""
    has_estimate: bool
    """Whether the last stage is among `stages`, so that the segment returns the branch's estimate."""

    def read(self, branch: Branch, stage: int) -> Read:
        """How `branch` of this segment reads `stage` (outside the segment)."""
        return next(r for r in self.reads[self.branches.index(branch)] if r.stage == stage)

    def __str__(self) -> str:
        letters = "".join(b[0] for b in self.branches)
        return f"{letters}[{','.join(map(str, self.stages))}]@{self.rank}"


@lru_cache(maxsize=4096)
def lower(pattern: Pattern) -> tuple[Segment, ...]:
    """The segments of `pattern` in an order that satisfies every fresh read.

    Raises:
        InputError: fresh reads form a cycle across ranks or branches, so that no order exists (a deadlock).
    """
    groups = _fuse(pattern)
    graph = nx.DiGraph()
    owner = {(u.branch, u.stage): index for index, group in enumerate(groups) for u in group}
    graph.add_nodes_from(range(len(groups)))
    for index, group in enumerate(groups):
        for read in _outside_reads(pattern, group):
            if read.fresh:
                graph.add_edge(owner[read.branch, read.stage], index)
    graph.remove_edges_from(nx.selfloop_edges(graph))
    try:
        order = list(nx.lexicographical_topological_sort(graph))
    except nx.NetworkXUnfeasible:
        raise InputError(
            f"pattern {pattern}: its fresh reads wait for each other in a circle; mark at least one of them stale ('~')"
        ) from None
    segments = [_segment(pattern, groups[index]) for index in order]
    return tuple(_batch(segments))


def _fuse(pattern: Pattern) -> list[list[Unit]]:
    """Connected components of same-branch, same-rank units under fresh same-branch reads."""
    links = nx.Graph()
    links.add_nodes_from(range(len(pattern.units)))
    for i, unit in enumerate(pattern.units):
        for j, other in enumerate(pattern.units):
            if i == j or (unit.branch, unit.rank) != (other.branch, other.rank):
                continue
            read = unit.read(other.stage)
            if read.fresh and read.branch == unit.branch:
                links.add_edge(i, j)
    components = sorted((sorted(c) for c in nx.connected_components(links)), key=lambda c: c[0])
    groups = []
    for component in components:
        group = sorted((pattern.units[i] for i in component), key=lambda u: u.stage)
        inside = {u.stage for u in group}
        consistent = all(
            (unit.read(stage).fresh and unit.read(stage).branch == unit.branch) or unit.read(stage).nothing
            for unit in group for stage in inside - {unit.stage}
        )
        # A stage pair with one fresh and one stale direction must stay two launches: the stale edge is a cut.
        groups.extend([group] if consistent else [[unit] for unit in group])
    return groups


def _outside_reads(pattern: Pattern, group: list[Unit]) -> tuple[Read, ...]:
    inside = {u.stage for u in group}
    reads: dict[int, Read] = {}
    for unit in group:
        for stage in range(pattern.stages):
            if stage in inside:
                continue
            read = unit.read(stage)
            if reads.setdefault(stage, read) != read:
                raise InputError(
                    f"pattern {pattern}: units fused on rank {unit.rank} read stage {stage} in two ways "
                    f"({reads[stage]} and {read}); make the reads equal"
                )
    return tuple(reads[stage] for stage in sorted(reads))


def _segment(pattern: Pattern, group: list[Unit]) -> Segment:
    return Segment(
        partition=pattern.partition,
        stages=tuple(u.stage for u in group),
        branches=(group[0].branch,),
        rank=group[0].rank,
        reads=(_outside_reads(pattern, group),),
        has_estimate=pattern.stages - 1 in {u.stage for u in group},
    )


def _batch(segments: list[Segment]) -> list[Segment]:
    """Join the two branches' segments of equal rank, stages and read kinds when nothing fresh orders them."""
    result: list[Segment] = []
    for segment in segments:
        for index, earlier in enumerate(result):
            if _can_batch(earlier, segment):
                pair = {earlier.branches[0]: earlier, segment.branches[0]: segment}
                result[index] = Segment(
                    partition=segment.partition, stages=segment.stages, branches=BRANCHES, rank=segment.rank,
                    reads=tuple(pair[b].reads[0] for b in BRANCHES), has_estimate=segment.has_estimate,
                )
                break
        else:
            result.append(segment)
    return result


def _can_batch(a: Segment, b: Segment) -> bool:
    if (a.rank, a.stages) != (b.rank, b.stages) or len(a.branches) != 1 or a.branches == b.branches:
        return False
    return all(r.stale and s.stale for r, s in zip(a.reads[0], b.reads[0]))
