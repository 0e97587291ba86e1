"""One rank's part of a step: the same code on the driver and on the workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..backends.cuda_graph import Recorder, recorder_for
from ..backends.kept import Moment
from ..capture import CapturedDenoiser
from ..ir import Branch, InputError, Plan, PlanMismatchError, Segment
from .branch_calls import capture_branch, scale_signature
from .exchange import Exchange, Flow, Message, Slot
from .segments import SegmentRunner, is_bundle, stored_graphs
from .transport import Channel, Incoming, Layout, Transport

if TYPE_CHECKING:
    from ..bundle import StoredGraphs

__all__ = ["RankExecutor", "RankExecutors", "capture_for", "graphs_for"]


def capture_for(plan: Plan, denoiser: nn.Module) -> CapturedDenoiser:
    """The denoiser's graph at the plan's call.

    Raises:
        PlanMismatchError: the plan was made for another denoiser.
    """
    try:
        captured = capture_branch(denoiser, plan.model.signature)
    except InputError as error:
        if type(denoiser).__name__ == plan.model.denoiser:
            raise
        raise PlanMismatchError(
            f"the plan was made for {plan.model.name} ({plan.model.denoiser}), this is a {type(denoiser).__name__}: "
            f"{error}; profile this model and plan again"
        ) from None
    fingerprint = captured.layers.fingerprint()
    if fingerprint != plan.model.fingerprint:
        raise PlanMismatchError(
            f"the plan was made for {plan.model.name} ({plan.model.denoiser}, layer graph "
            f"{plan.model.fingerprint[:12]}), this {type(denoiser).__name__} has layer graph {fingerprint[:12]}; "
            "profile this model and plan again"
        )
    return captured


def graphs_for(plan: Plan, denoiser: nn.Module, backend: str) -> CapturedDenoiser | StoredGraphs:
    """What a rank takes its graphs from: a capture, or the bundle that `backend` names, without one.

    Raises:
        InputError: the bundle is damaged.
        PlanMismatchError: plan or bundle was made for another denoiser.
    """
    return stored_graphs(backend, denoiser) if is_bundle(backend) else capture_for(plan, denoiser)


class RankExecutor:
    """Runs this rank's segments of one pattern after another and keeps the values that later steps read.

    What it holds between steps is the newest copy that reached this rank of every value; `Placement` says which of
    them are the newest anywhere. A stale read sees the state at the start of the step, a fresh read what the step
    computed, so the result equals the simulator's.
    """

    def __init__(
        self, plan: Plan, denoiser: nn.Module, captured: CapturedDenoiser | StoredGraphs, *, rank: int,
        transport: Transport | None, backend: str, recorder: Recorder | None = None, images: int = 1,
    ) -> None:
        """No graph is built before `prepare` or the first `run`.

        Args:
            plan: the tables.
            denoiser: the network with its weights, which are used by reference.
            captured: the denoiser's graphs at `images` images per branch (for one: from `graphs_for`).
            rank: this rank.
            transport: to the other ranks; None in a world of one.
            backend: see `hybridiff_compiler.backends`.
            recorder: see `SegmentRunner`; default: CUDA graphs on CUDA.
            images: per branch and call.
        """
        self.rank = rank
        self._device, self._num_steps = next(denoiser.parameters()).device, plan.num_steps
        self.runner = runner = SegmentRunner(
            denoiser, scale_signature(plan.model.signature, 1, images), plan.patterns, plan.partitions, batch=images,
            backend=backend, captured=captured,
            recorder=recorder or recorder_for(self._device),
        )
        self._estimate_spec = runner.estimate_spec
        self._transport = transport
        self._exchange = Exchange(plan.patterns, runner)
        self._placement = self._exchange.start
        self._values: dict[Slot, Tensor] = {}
        self._pending: list[tuple[Message, Incoming]] = []
        self._layouts: dict[tuple[Slot, ...], Layout] = {}
        self._estimate_layouts: dict[tuple[Branch, ...], Layout] = {}

    def flow(self, name: str) -> Flow:
        """The static part of pattern `name`."""
        return self._exchange.flows[name]

    @property
    def segments(self) -> list[Segment]:
        """One segment of every graph of this rank, always in the same order."""
        launched = [launch.segment for flow in self._exchange.flows.values() for launch in flow.on(self.rank)]
        return list({(s.partition, s.stages, len(s.branches)): s for s in launched}.values())

    def prepare(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Build every graph of this rank now."""
        self.runner.prepare(self.segments, on_progress)

    def stage_seconds(self, name: str) -> float:
        """Time of this rank's graphs of pattern `name` alone: no transfers, nothing else of a step.

        On GPUs over as long as a generation takes, after as long again, because they lower their clocks within that
        time when all ranks are at work.
        """
        launches = self.flow(name).on(self.rank)
        if self._device.type != "cuda":
            return sum(self.runner.seconds(launch.segment) for launch in launches)
        return sum(
            self.runner.seconds(launch.segment, self._num_steps, warm_up=self._num_steps) for launch in launches
        )

    def reset(self) -> None:
        """A generation begins: let transfers under way finish, then forget all values."""
        self._arrive()
        self.runner.forget()
        self._values.clear()
        self._placement = self._exchange.start

    def involved(self, name: str, following: str | None) -> frozenset[int]:
        """Ranks that compute or exchange anything in a step of `name` that is followed by `following`."""
        flow = self.flow(name)
        before, placement = self._exchange.settle(self._placement, name)
        after: tuple[Message, ...] = ()
        if following is not None:
            after, _ = self._exchange.settle(self._exchange.advance(placement, name), following)
        return flow.ranks.union(*((m.source, m.target) for m in (*before, *after)))

    def skip(self, name: str) -> None:
        """Note a step of `name` in which this rank has no part."""
        _, placement = self._exchange.settle(self._placement, name)
        self._placement = self._exchange.advance(placement, name)

    def run(
        self, name: str, following: str | None, inputs: Mapping[Branch, Mapping[str, Tensor]],
        moment: Moment | None = None,
    ) -> dict[Branch, Tensor]:
        """This rank's part of one step; returns the estimates that it computed.

        Workers have sent theirs by then; the driver collects those with `estimates_from_workers`. Values that
        `following` reads stale on another rank are on their way when this returns.

        Raises:
            PeerError: another rank is gone or silent.
        """
        flow = self.flow(name)
        self._settle(name)
        awaited = {message: self._receive(message) for message in flow.receives(self.rank)}
        self._arrive()
        written: dict[Slot, Tensor] = {}
        computed: dict[Branch, Tensor] = {}
        for launch in flow.on(self.rank):
            for message in launch.receives:
                if message in awaited:
                    written.update(zip(message.slots, awaited.pop(message).wait()))
            taken = {slot: self._values[slot] for slot in launch.stale}
            taken.update((slot, written[slot]) for slot in launch.fresh)
            # Other ranks than the driver's have sent theirs by the next run.
            estimates, values = self.runner.run(
                launch.segment, inputs, taken, keep_estimates=self.rank == 0, moment=moment
            )
            if estimates and self.rank:
                self._send_estimates(estimates)
            computed.update(estimates)
            written.update((slot, self._own(value)) for slot, value in values.items())
            for message in launch.sends:
                self._send(message, written)
        self._values.update(written)
        self._placement = self._exchange.advance(self._placement, name)
        if following is not None:
            self._settle(following)
        return computed

    def expect_estimates(self, name: str) -> list[tuple[tuple[Branch, ...], Incoming]]:
        """On the driver, before `run`: the estimates that workers will send in this step."""
        expected = []
        for launch in self.flow(name).launches:
            segment = launch.segment
            if segment.has_estimate and segment.rank != self.rank:
                assert self._transport is not None
                layout = self._estimate_layout(segment.branches)
                # New memory every time: estimates are remembered for as long as the schedule needs them.
                incoming = self._transport.receive(segment.rank, Channel.ESTIMATES, layout, keep=True)
                expected.append((segment.branches, incoming))
        return expected

    def _settle(self, name: str) -> None:
        messages, self._placement = self._exchange.settle(self._placement, name)
        for message in messages:
            if message.source == self.rank:
                self._send(message, self._values)
            elif message.target == self.rank:
                self._pending.append((message, self._receive(message)))

    def _arrive(self) -> None:
        for message, incoming in self._pending:
            self._values.update(zip(message.slots, incoming.wait()))
        self._pending.clear()

    def _send(self, message: Message, values: Mapping[Slot, Tensor]) -> None:
        assert self._transport is not None
        tensors = [values[slot] for slot in message.slots]
        self._transport.send(message.target, Channel.VALUES, self._layout(message.slots), tensors)

    def _receive(self, message: Message) -> Incoming:
        assert self._transport is not None
        return self._transport.receive(message.source, Channel.VALUES, self._layout(message.slots))

    def _send_estimates(self, estimates: Mapping[Branch, Tensor]) -> None:
        assert self._transport is not None
        layout = self._estimate_layout(tuple(estimates))
        self._transport.send(0, Channel.ESTIMATES, layout, list(estimates.values()))

    def _own(self, value: Tensor) -> Tensor:
        """`value`, copied if it is a view of a receive buffer, which a later message would overwrite."""
        if self._transport is not None and self._transport.owns(value):
            return value.clone()
        return value

    def _layout(self, slots: tuple[Slot, ...]) -> Layout:
        if slots not in self._layouts:
            self._layouts[slots] = Layout([self.runner.value_spec(name) for _, name in slots])
        return self._layouts[slots]

    def _estimate_layout(self, branches: tuple[Branch, ...]) -> Layout:
        if branches not in self._estimate_layouts:
            self._estimate_layouts[branches] = Layout([self._estimate_spec] * len(branches))
        return self._estimate_layouts[branches]

class RankExecutors:
    """One rank's executors by the number of images per call; each is made when it is first asked for."""

    def __init__(
        self, plan: Plan, denoiser: nn.Module, captured: CapturedDenoiser | StoredGraphs, *, rank: int,
        transport: Transport | None, backend: str,
    ) -> None:
        """See `RankExecutor`; `captured` is from `graphs_for`."""
        self._make = partial(RankExecutor, plan, denoiser, rank=rank, transport=transport, backend=backend)
        self._plan, self._denoiser, self._layers = plan, denoiser, captured.layers
        self._from_bundle = is_bundle(backend)
        self._known = {1: self._make(captured)}

    def __contains__(self, images: int) -> bool:
        return images in self._known

    def at(self, images: int) -> RankExecutor:
        """The executor for so many images per call; its graphs are built by its `prepare`.

        Raises:
            PlanMismatchError: the denoiser's graph is another one at this batch size, or graphs come from a bundle.
        """
        if images not in self._known:
            if self._from_bundle:
                raise PlanMismatchError(
                    f"the bundle was compiled for one image at a time, got {images}; generate them one by one, or run "
                    "the plan itself"
                )
            captured = capture_branch(self._denoiser, scale_signature(self._plan.model.signature, 1, images))
            if captured.layers.names != self._layers.names or (
                [value.name for value in captured.layers.values] != [value.name for value in self._layers.values]
            ):
                raise PlanMismatchError(
                    f"the denoiser's graph for {images} images at a time differs from the one for a single image; "
                    "generate the images one by one"
                )
            self._known[images] = self._make(captured, images=images)
        return self._known[images]
