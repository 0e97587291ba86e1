"""How much memory every rank of a plan needs: parameters, the stage graphs' own memory, and what is kept between steps.

A model of `runtime`: per rank, the graphs that it launches (every pattern's segments, each once), built one after the
other. On GPUs a graph is warmed up and then recorded into a pool that all graphs of the rank share; its input buffers
and results stay, and so do the results of what compiled graphs compute once per generation, or for many timesteps at a
time, of which there is one copy in the pool and at least one beside it (`backends.kept`).

It counts tensors, and activations inside of a layer by an upper bound (`segment_activations`). Not in it are what the
allocator adds (blocks are rounded up, and weights that `backends.merging` moves next to each other leave gaps), what
convolution libraries and the device's context take, and other parts of the pipeline (text encoders, VAE).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..ir import WHOLE, CallSignature, LayerGraph, LeafSpec, Partition, Pattern, Segment, Value, lower

__all__ = ["RankMemory", "latent_bytes", "leaf_bytes", "plan_memory", "predicted_peaks", "segment_activations"]

_ITEM_BYTES = {
    "float64": 8, "int64": 8, "complex64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2,
}
_LATENT_NAMES = ("sample", "hidden_states", "x", "latents")
_WORKSPACE = 32 << 20
"""Of the matrix library, once per stream that it is used on: torch's size for current data centre GPUs."""
_STREAMS = 2
"""The one that graphs are recorded on, and the one that the pipeline uses."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """What one rank holds at its peak, in bytes."""

    parameters: int
    graphs: int
    """Activations inside of graphs: the shared pool, and at its worst moment a warm-up beside it."""
    buffers: int
    """Inputs and results of graphs, also of their parts that do not run at every step, values kept for later steps, and
    messages."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.graphs + self.buffers


def plan_memory(
    graph: LayerGraph,
    signature: CallSignature,
    patterns: Sequence[Pattern],
    partitions: Iterable[Partition],
    *,
    ranks: int,
    parameter_bytes: int,
    images: int = 1,
    recorded: bool = True,
    stage_weights: bool = False,
) -> tuple[RankMemory, ...]:
    """The memory of every rank that can run all of `patterns`.

    Args:
        graph: the denoiser at one branch and one image.
        signature: its call.
        patterns: all tables that the ranks are to know.
        partitions: those that the patterns name.
        ranks: how many.
        parameter_bytes: of the whole denoiser.
        images: per branch and call.
        recorded: whether graphs are compiled, recorded and replayed on static buffers, as on GPUs.
        stage_weights: each rank holds the parameters of the stages that it evaluates instead of all.
    """
    known = {p.name: p for p in partitions} | {WHOLE: Partition.whole(graph)}
    taps = _taps(graph, patterns, known)
    return tuple(
        _rank_memory(
            _Rank(graph, signature, known, taps, rank, images), patterns,
            parameter_bytes=parameter_bytes, recorded=recorded, stage_weights=stage_weights,
        )
        for rank in range(ranks)
    )


def predicted_peaks(
    graph: LayerGraph, signature: CallSignature, patterns: Sequence[Pattern], partitions: Iterable[Partition], *,
    ranks: int, parameter_bytes: int, recorded: bool = True, stage_weights: bool = False,
) -> tuple[int, ...]:
    """Per rank, the total of `plan_memory` for one image."""
    return tuple(
        memory.total for memory in plan_memory(
            graph, signature, patterns, partitions, ranks=ranks, parameter_bytes=parameter_bytes, recorded=recorded,
            stage_weights=stage_weights,
        )
    )


def segment_activations(graph: LayerGraph, layers: Iterable[str]) -> int:
    """The most bytes alive at once while `layers` are evaluated as one graph, for one branch and image.

    Values between layers live from their producer to their last reader inside. What a layer makes for itself is at
    most half of its traffic without parameters: everything is written once and read at least once. (Graphs from before
    traffic was counted have none.)
    """
    inside = frozenset(layers)
    position = {name: index for index, name in enumerate(graph.names)}
    change = [0] * (len(graph.layers) + 1)
    for value in graph.values:
        last = max((position[name] for name in value.consumers if name in inside), default=-1)
        if value.producer in inside and last >= 0:
            change[position[value.producer]] += value.nbytes
            change[last + 1] -= value.nbytes
    most = alive = 0
    for index, layer in enumerate(graph.layers):
        alive += change[index]
        if layer.name in inside:
            most = max(most, alive + max(0, layer.traffic_bytes - layer.parameter_bytes) // 2)
    return most


def leaf_bytes(signature: CallSignature) -> int:
    """Bytes of all tensors of one branch's call."""
    return sum(_bytes_of(leaf) for leaf in signature.leaves if leaf.shape is not None)


def latent_bytes(signature: CallSignature) -> int:
    """Bytes of one branch's latents, which are those of its estimate too."""
    tensors = [leaf for leaf in signature.leaves if leaf.shape is not None]
    named = {leaf.path: leaf for leaf in tensors}
    leaf = next((named[name] for name in _LATENT_NAMES if name in named), None)
    return max((_bytes_of(leaf) for leaf in tensors), default=0) if leaf is None else _bytes_of(leaf)


def _bytes_of(leaf: LeafSpec) -> int:
    return math.prod(leaf.shape or ()) * _ITEM_BYTES.get(leaf.dtype or "", 4)


def _taps(
    graph: LayerGraph, patterns: Iterable[Pattern], partitions: dict[str, Partition]
) -> dict[str, Value]:
    """The values that some segment of `patterns` takes from outside, by name."""
    return {
        value.name: value for pattern in patterns for segment in lower(pattern)
        for value in _received(graph, partitions[segment.partition], segment)
    }


def _received(graph: LayerGraph, partition: Partition, segment: Segment) -> tuple[Value, ...]:
    return tuple(
        value for stage in range(len(partition.stages)) if stage not in segment.stages
        for value in partition.received(graph, stage, segment.stages)
    )


@dataclass(frozen=True)
class _Rank:
    """One rank with what all ranks have in common."""

    graph: LayerGraph
    signature: CallSignature
    partitions: dict[str, Partition]
    taps: dict[str, Value]
    number: int
    images: int

    def segments(self, patterns: Iterable[Pattern]) -> list[Segment]:
        """What this rank launches in any pattern."""
        return [s for pattern in patterns for s in lower(pattern) if s.rank == self.number]

    def evaluated(self, segment: Segment) -> tuple[str, ...]:
        return self.partitions[segment.partition].evaluated(segment.stages)

    def received(self, segment: Segment) -> tuple[Value, ...]:
        return _received(self.graph, self.partitions[segment.partition], segment)

    def hoisted(self, segment: Segment, *, alternating: bool) -> int:
        """Bytes, per branch evaluated at a time, of what does not run at every step, at most.

        Results computed once stay where they are made and are copied to where the other parts read them; results for
        many timesteps are copied to a table. One graph that serves both branches in turn keeps two sets more of the
        former, and two tables instead of one.
        """
        inside = set(self.evaluated(segment))
        layers = [layer for layer in self.graph.layers if layer.name in inside]
        once = (4 if alternating else 2) * sum(layer.once_bytes for layer in layers)
        if not any(layer.takes_timestep for layer in layers):
            return once
        return once + (3 if alternating else 2) * sum(layer.timed_bytes for layer in layers)

    def written(self, segment: Segment) -> list[Value]:
        partition = self.partitions[segment.partition]
        own = {name for stage in segment.stages for name in partition.stages[stage]}
        return [value for value in self.taps.values() if value.producer in own]


def _rank_memory(
    rank: _Rank, patterns: Sequence[Pattern], *, parameter_bytes: int, recorded: bool, stage_weights: bool
) -> RankMemory:
    segments = rank.segments(patterns)
    graphs = list({_key(s): s for s in segments}.values())
    both = {_key(s) for s in segments if s.branches == ("uncond",)} & {
        _key(s) for s in segments if s.branches == ("cond",)
    }
    sample, call = latent_bytes(rank.signature) * rank.images, leaf_bytes(rank.signature) * rank.images
    parameters = parameter_bytes
    if stage_weights:
        held = {name for segment in graphs for name in rank.evaluated(segment)}
        parameters = min(parameters, sum(la.parameter_bytes for la in rank.graph.layers if la.name in held))
    pool = kept = worst = static = 0
    for segment in graphs:
        branches = len(segment.branches) * rank.images
        active = segment_activations(rank.graph, rank.evaluated(segment)) * branches
        results = _nbytes(rank.written(segment)) * branches
        results += sample * len(segment.branches) if segment.has_estimate else 0
        if recorded:
            static += call * len(segment.branches) + _nbytes(rank.received(segment)) * branches
            static += rank.hoisted(segment, alternating=_key(segment) in both) * branches
            worst = max(worst, pool + kept + active + results)  # a warm-up beside the pool
            pool, kept = max(pool, active), kept + results
            worst = max(worst, pool + kept)
        else:
            worst = max(worst, active + results)
    slots = {(branch, value.name): value for s in segments for value in rank.written(s) for branch in s.branches}
    read = {
        (other.branch, value.name): value for s in segments for branch, reads in zip(s.branches, s.reads)
        for other in reads
        for value in rank.partitions[s.partition].received(rank.graph, other.stage, s.stages)
    }
    # Two copies of what is written for later steps; two messages in turn of what comes from or goes to other ranks.
    values = 2 * (_nbytes(slots.values()) + _nbytes(v for slot, v in read.items() if slot not in slots)) * rank.images
    alone = not any(s.rank != rank.number for pattern in patterns for s in lower(pattern))
    messages = 0 if alone or not segments else 2 * (2 * call + 2 * sample)
    workspace = _STREAMS * _WORKSPACE if recorded else 0
    return RankMemory(
        parameters=parameters, graphs=worst + workspace if graphs else 0, buffers=static + values + messages,
    )


def _key(segment: Segment) -> tuple[str, tuple[int, ...], int]:
    """Equal for segments that run the same graph."""
    return segment.partition, segment.stages, len(segment.branches)


def _nbytes(values: Iterable[Value]) -> int:
    return sum(value.nbytes for value in values)
