"""Segment graphs: from a pattern's segments to callables on real tensors.

The values that travel between segments are tensors of the captured graph, kept per branch under `(branch, value
name)`. Names do not depend on the partition, so what one pattern leaves behind can be read by a pattern that cuts the
denoiser elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..backends import LAZY, compile_stage
from ..backends.cuda_graph import Recorder, Replay, seconds_per_call
from ..backends.hoisting import Hoisted
from ..backends.kept import Moment, Remembered, memory_key
from ..capture import CapturedDenoiser, StageGraph
from ..ir import WHOLE, Branch, CallSignature, Partition, Pattern, PlanMismatchError, Read, Segment, lower
from .branch_calls import capture_branch, scale_signature

if TYPE_CHECKING:
    from ..bundle import StoredGraphs

__all__ = ["SegmentRunner", "Slot", "ValueRead", "is_bundle", "stored_graphs"]

Slot = tuple[Branch, str]
"""Branch and value name: the key under which a value is kept."""


@dataclass(frozen=True)
class ValueRead:
    """One value that a segment takes from outside."""

    branch: Branch
    """The branch of the segment that reads."""
    value: str
    source: Slot
    """What it reads: the branch whose value it is, and the value's name."""
    stale: bool


@dataclass(frozen=True)
class _Graph:
    """An executable stage graph with the names of its arguments and results."""

    call: Callable[..., Sequence[Tensor]]
    inputs: tuple[str, ...]
    values_in: tuple[str, ...]
    values_out: tuple[str, ...]
    specs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Shape and dtype of every argument."""


def is_bundle(backend: str) -> bool:
    """Whether `backend` names a bundle, whose graphs are loaded instead of captured and compiled."""
    return backend.startswith("bundle:")


def stored_graphs(backend: str, denoiser: nn.Module) -> StoredGraphs:
    """The graphs of the bundle that `backend` names; see `bundle.open_graphs`."""
    from ..bundle import open_graphs

    return open_graphs(backend, denoiser)


class SegmentRunner:
    """All segment graphs that a set of patterns needs, for one denoiser at one branch batch size."""

    def __init__(
        self,
        denoiser: nn.Module,
        signature: CallSignature,
        patterns: Iterable[Pattern],
        partitions: Iterable[Partition],
        *,
        batch: int = 1,
        backend: str = "eager",
        captured: CapturedDenoiser | Mapping[int, CapturedDenoiser] | StoredGraphs | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """
        Args:
            denoiser: the network; its parameters are used by reference.
            signature: one branch's call.
            patterns: every pattern that will run.
            partitions: the partitions that they name (`whole` needs no entry).
            batch: leading size of the leaves of `signature` that carry the images of a branch.
            backend: see `hybridiff_compiler.backends`, or the name of a bundle.
            captured: the graph at `signature`, when the caller has it already; or graphs by the number of branches
                batched together, 1 among them; or the graphs of the bundle.
            recorder: replay the graphs on static buffers (see `backends.cuda_graph`); default: call them.

        Raises:
            PlanMismatchError: a partition does not fit the captured graph, or the bundle does not hold these graphs.
        """
        partitions = tuple(partitions)
        self._denoiser, self._signature, self._batch, self._backend = denoiser, signature, batch, backend
        self._device = next(denoiser.parameters()).device
        self._recorder = recorder
        self._kept: dict[Slot, list[Tensor]] = {}
        self._joined: dict[tuple[str, tuple[Branch, ...]], tuple[object, list[Tensor], Tensor]] = {}
        self._stored: StoredGraphs | None = None
        self._captures: dict[int, CapturedDenoiser] = {}
        if is_bundle(backend):
            self._stored = stored_graphs(backend, denoiser) if captured is None else cast("StoredGraphs", captured)
            self._stored.check_covers(signature, partitions)
            self.layers = self._stored.layers
        else:
            if isinstance(captured, Mapping):
                self._captures.update(captured)
            else:
                self._captures[1] = cast("CapturedDenoiser", captured or capture_branch(denoiser, signature))
            self.layers = self._captures[1].layers
        self._partitions = {p.name: p for p in partitions} | {WHOLE: Partition.whole(self.layers)}
        for partition in self._partitions.values():
            partition.check_covers(self.layers)
        self._value_specs = {value.name: value for value in self.layers.values}
        # Not lru_cache: that of a method would keep every runner, and with it the denoiser's memory, for ever.
        self._reads: dict[Segment, tuple[ValueRead, ...]] = {}
        self._writes: dict[Segment, tuple[Slot, ...]] = {}
        segments = dict.fromkeys(s for pattern in patterns for s in lower(pattern))
        self.taps = tuple(dict.fromkeys(r.value for s in segments for r in self.values_read(s)))
        self._graphs: dict[tuple[str, tuple[int, ...], int], _Graph] = {}

    @property
    def denoiser(self) -> nn.Module:
        """The network."""
        return self._denoiser

    @property
    def signature(self) -> CallSignature:
        """One branch's call."""
        return self._signature

    def values_read(self, segment: Segment) -> tuple[ValueRead, ...]:
        """What `segment` takes from outside, in a fixed order."""
        if segment not in self._reads:
            self._reads[segment] = self._find_reads(segment)
        return self._reads[segment]

    def values_written(self, segment: Segment) -> tuple[Slot, ...]:
        """The slots that `segment` renews: every value some pattern reads that its layers produce."""
        if segment not in self._writes:
            self._writes[segment] = self._find_writes(segment)
        return self._writes[segment]

    def _find_reads(self, segment: Segment) -> tuple[ValueRead, ...]:
        partition = self._partitions[segment.partition]
        reads = []
        for branch in segment.branches:
            for stage in range(len(partition.stages)):
                if stage in segment.stages:
                    continue
                read: Read = segment.read(branch, stage)
                if read.nothing and (received := partition.received(self.layers, stage, segment.stages)):
                    raise PlanMismatchError(
                        f"segment {segment} says that it reads nothing of stage {stage} of {partition.name!r}, but it "
                        f"takes {received[0].name!r} from there; mark the read stale ('~'), or use a linear partition"
                    )
                for value in partition.received(self.layers, stage, segment.stages):
                    reads.append(ValueRead(branch, value.name, (read.branch, value.name), read.stale))
        return tuple(reads)

    def _find_writes(self, segment: Segment) -> tuple[Slot, ...]:
        partition = self._partitions[segment.partition]
        inside = {name for stage in segment.stages for name in partition.stages[stage]}
        names = [name for name in self.taps if self._value_specs[name].producer in inside]
        return tuple((branch, name) for branch in segment.branches for name in names)

    def value_spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a value at the branch batch size."""
        value = self._value_specs[name]
        return value.shape, getattr(torch, value.dtype)

    @property
    def estimate_spec(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one branch's estimate."""
        if self._stored is not None:
            return self._stored.estimate
        value = self._captures[1].graph_module.graph.output_node().all_input_nodes[0].meta["val"]
        return tuple(value.shape), value.dtype

    def prepare(
        self, segments: Iterable[Segment], on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Build (and record) the graphs of `segments` now instead of at their first run."""
        distinct = list({(s.partition, s.stages, len(s.branches)): s for s in segments}.values())
        for done, segment in enumerate(distinct):
            on_progress(done, len(distinct))
            graph = self._graph(segment)
            if self._recorder is None and self._backend in LAZY:
                with torch.no_grad():
                    graph.call(*self._examples(graph))
        on_progress(len(distinct), len(distinct))

    def run(
        self, segment: Segment, inputs: Mapping[Branch, Mapping[str, Tensor]], values: Mapping[Slot, Tensor], *,
        keep_estimates: bool = True, moment: Moment | None = None,
    ) -> tuple[dict[Branch, Tensor], dict[Slot, Tensor]]:
        """Evaluate a segment.

        Args:
            segment: what to run.
            inputs: per branch, leaf path -> tensor.
            values: at least the sources of `values_read(segment)`.
            keep_estimates: whether estimates must last longer than until the next run (of any segment).
            moment: which step this is, if the timesteps of all are known.

        Returns:
            The estimates by branch (empty unless the segment holds the last stage) and the written values.
        """
        graph = self._graph(segment)
        sources = {(read.branch, read.value): read.source for read in self.values_read(segment)}
        leaves = self.join_inputs(inputs, segment.branches)
        arguments = [leaves[path] for path in graph.inputs]
        for name in graph.values_in:
            arguments.append(torch.cat([values[sources[b, name]] for b in segment.branches])
                             if len(segment.branches) > 1 else values[sources[segment.branches[0], name]])
        call = graph.call
        if isinstance(call, Replay):
            results = list(call(*arguments, leaves=len(graph.inputs), moment=moment))
        else:
            results = list(call(*arguments, moment=moment) if isinstance(call, Remembered) else call(*arguments))
        estimates: dict[Branch, Tensor] = {}
        if segment.has_estimate:
            estimates = dict(zip(segment.branches, results.pop(0).chunk(len(segment.branches))))
        written: dict[Slot, Tensor] = {}
        for name, result in zip(graph.values_out, results, strict=True):
            for branch, part in zip(segment.branches, result.chunk(len(segment.branches))):
                written[branch, name] = part
        if self._recorder is not None:  # the next replay overwrites the results
            if keep_estimates:
                estimates = {branch: estimate.clone() for branch, estimate in estimates.items()}
            written = {slot: self._keep(slot, value) for slot, value in written.items()}
        return estimates, written

    def forget(self) -> None:
        """A generation begins: nothing that was derived from inputs or weights is taken for unchanged."""
        self._joined.clear()
        for graph in self._graphs.values():
            if isinstance(graph.call, (Replay, Remembered)):
                graph.call.forget()

    @torch.no_grad()
    def seconds(self, segment: Segment, repeats: int = 20, warm_up: int = 1) -> float:
        """Time of one evaluation of a segment's bare graph, as it runs here: device time on CUDA, else wall time."""
        graph = self._graph(segment)
        call = graph.call
        run = call.replay if isinstance(call, Replay) else partial(call, *self._examples(graph))
        return seconds_per_call(run, self._device, repeats, warm_up=warm_up)

    def _examples(self, graph: _Graph) -> list[Tensor]:
        return [torch.ones(shape, dtype=dtype, device=self._device) for shape, dtype in graph.specs]

    def _keep(self, slot: Slot, value: Tensor) -> Tensor:
        """A copy of `value` that lasts until the slot is written for the second next time.

        Two buffers in turn are enough: a step writes a slot at most once, and stale reads of that step mean the value
        before.
        """
        if slot not in self._kept:
            with torch.inference_mode(False):
                self._kept[slot] = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(2)]
        pair = self._kept[slot]
        pair.reverse()
        return pair[0].copy_(value)

    def join_inputs(
        self, inputs: Mapping[Branch, Mapping[str, Tensor]], branches: Sequence[Branch]
    ) -> dict[str, Tensor]:
        """The branches' leaves as one batch; leaves without the image batch are shared."""
        if len(branches) == 1:
            return dict(inputs[branches[0]])
        joined = dict(inputs[branches[0]])
        for path, leaf in joined.items():
            if leaf.dim() and leaf.shape[0] == self._batch:
                joined[path] = self._join(path, tuple(branches), [inputs[branch][path] for branch in branches])
        return joined

    def _join(self, path: str, branches: tuple[Branch, ...], leaves: list[Tensor]) -> Tensor:
        """The branches' values of one leaf as a batch; the same tensor as long as they do not change."""
        keys = [memory_key(leaf) for leaf in leaves]
        known = self._joined.get((path, branches))
        if known is not None and None not in keys and known[0] == keys:
            return known[2]
        joined = torch.cat(leaves)
        self._joined[path, branches] = keys, leaves, joined  # held on to, so that their memory is not handed out again
        return joined

    def _graph(self, segment: Segment) -> _Graph:
        key = (segment.partition, segment.stages, len(segment.branches))
        if key not in self._graphs:
            graph = self._build(segment)
            if self._recorder is not None:
                graph = replace(graph, call=Replay(graph.call, graph.specs, self._device, self._recorder))
            elif isinstance(graph.call, Hoisted):
                graph = replace(graph, call=Remembered(graph.call))
            self._graphs[key] = graph
        return self._graphs[key]

    def _build(self, segment: Segment) -> _Graph:
        """Compile the graph of a segment, or load it."""
        if self._stored is not None:
            loaded = self._stored.stage(segment, self._taps_of(segment))
            return _Graph(loaded.call, loaded.inputs, loaded.values_in, loaded.values_out, loaded.specs)
        stage = self.stage(segment)
        call = compile_stage(stage, self._backend)
        return _Graph(call, stage.inputs, stage.values_in, stage.values_out, _argument_specs(stage))

    def stage(self, segment: Segment) -> StageGraph:
        """The graph of a segment as it goes to the backend."""
        names = self._partitions[segment.partition].evaluated(segment.stages)
        return self.captured(len(segment.branches)).extract(names, self._taps_of(segment))

    def _taps_of(self, segment: Segment) -> list[str]:
        return [name for branch, name in self.values_written(segment) if branch == segment.branches[0]]

    def captured(self, branches: int = 1) -> CapturedDenoiser:
        """The capture for so many branches batched together."""
        if branches not in self._captures:
            signature = scale_signature(self._signature, self._batch, branches)
            captured = capture_branch(self._denoiser, signature)
            if captured.layers.names != self.layers.names or [v.name for v in captured.layers.values] != [
                v.name for v in self.layers.values
            ]:
                raise PlanMismatchError(
                    f"the denoiser's graph at batch {self._batch * branches} differs from the one at batch "
                    f"{self._batch}; both branches cannot be batched, put them on different ranks"
                )
            self._captures[branches] = captured
        return self._captures[branches]


def _argument_specs(stage: StageGraph) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    values = [node.meta["val"] for node in stage.module.graph.nodes if node.op == "placeholder"]
    return tuple((tuple(value.shape), value.dtype) for value in values)
