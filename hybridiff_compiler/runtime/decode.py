"""Running band programs: one rank's part of a decode, between ranks or side by side in one process."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import compile_stage
from ..backends.cuda_graph import Recorder
from ..capture import StageGraph
from ..capture.bands import BandProgram, Parcel, Phase
from .transport import Channel, Layout, Transport

__all__ = ["BandRunner", "join_bands", "run_side_by_side"]

Parcels = Mapping[int, Sequence[Tensor]]
"""By rank: the values of one message."""


@dataclass(frozen=True)
class _Step:
    """One phase, ready to run."""

    phase: Phase
    call: Callable[..., Sequence[Tensor]]
    dead: tuple[str, ...]
    """Values that no later phase reads."""


class BandRunner:
    """One rank's program as executables.

    With a recorder the phases are recorded one after the other on the memory that earlier ones leave their results in,
    so nothing is copied between them; a decode then replays all of them in that order.
    """

    def __init__(
        self, program: BandProgram, *, device: torch.device, backend: str = "eager", recorder: Recorder | None = None,
    ) -> None:
        """Nothing is compiled before `prepare`.

        Args:
            program: from `band_program`.
            device: of this rank.
            backend: see `hybridiff_compiler.backends`.
            recorder: of its own (see `backends.cuda_graph`); default: call the graphs.
        """
        self.program = program
        self._device, self._backend, self._recorder = device, backend, recorder
        self._steps: list[_Step] = []
        self._replays: list[Callable[[], None]] = []
        self._static: dict[str, Tensor] = {}
        self._layouts = {
            parcel: Layout(parcel.specs) for phase in program.phases for parcel in (*phase.sends, *phase.receives)
        }

    @property
    def is_recorded(self) -> bool:
        """Whether results live in memory that the next run overwrites."""
        return self._recorder is not None

    @torch.no_grad()
    def prepare(
        self, latents: tuple[Sequence[int], torch.dtype],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Compile (and record) every phase; other ranks are not needed for it.

        Args:
            latents: shape and dtype of the input.
            on_progress: called with (done, total).
        """
        if self._steps:
            return
        total = len(self.program.phases)
        last_read = {name: index for index, phase in enumerate(self.program.phases) for name in phase.takes}
        values = {BandProgram.LATENTS: self._static_input(*latents)} if self._recorder else {}
        for index, phase in enumerate(self.program.phases):
            on_progress(index, total)
            call = compile_stage(StageGraph(phase.module, (), phase.takes, phase.gives, False), self._backend)
            dead = tuple(name for name, last in last_read.items() if last == index)
            self._steps.append(_Step(phase, call, dead))
            if self._recorder is None:
                continue
            replay, results = self._recorder(call, [values[name] for name in phase.takes])
            self._replays.append(replay)
            values.update(zip(phase.gives, results, strict=True))
            for parcel in phase.receives:
                arriving = {name: self._static_input(*spec) for name, spec in zip(parcel.names, parcel.specs)}
                values.update(arriving)
                self._static.update(arriving)
            sent = [name for parcel in phase.sends for name in parcel.names]
            self._static.update((name, values[name]) for name in (*sent, self.program.result) if name in values)
            if index == 0:
                self._static[BandProgram.LATENTS] = values[BandProgram.LATENTS]
            for name in dead:  # what only the recordings read may be overwritten by later ones
                values.pop(name, None)
        on_progress(total, total)

    @torch.no_grad()
    def run(self, latents: Tensor, transport: Transport | None) -> Tensor:
        """This rank's part of the image; with a recorder it is valid until the next call.

        Raises:
            PeerError: another rank is gone or silent.
        """
        march = self.march(latents)
        outgoing = next(march)
        for phase in self.program.phases:
            incoming = self._exchange(phase, outgoing, transport)
            try:
                outgoing = march.send(incoming)
            except StopIteration as done:
                band: Tensor = done.value
                return band
        raise AssertionError("a decode ends with its last phase")

    def march(self, latents: Tensor) -> Generator[Parcels, Parcels, Tensor]:
        """Phase by phase: yields what goes to other ranks, is sent what came from them, returns the band."""
        values: dict[str, Tensor] = self._static
        if self._recorder is None:
            values = {BandProgram.LATENTS: latents}
        else:
            values[BandProgram.LATENTS].copy_(latents, non_blocking=True)
        for index, step in enumerate(self._steps):
            if self._recorder is None:
                results = step.call(*(values[name] for name in step.phase.takes))
                values.update(zip(step.phase.gives, results, strict=True))
            else:
                self._replays[index]()
            arrived = yield {parcel.peer: [values[name] for name in parcel.names] for parcel in step.phase.sends}
            for parcel in step.phase.receives:
                for name, tensor in zip(parcel.names, arrived[parcel.peer], strict=True):
                    if self._recorder is None:
                        values[name] = tensor
                    else:
                        values[name].copy_(tensor, non_blocking=True)
            if self._recorder is None:
                for name in step.dead:
                    values.pop(name, None)
        return values[self.program.result]

    def _exchange(self, phase: Phase, outgoing: Parcels, transport: Transport | None) -> Parcels:
        if not phase.sends and not phase.receives:
            return {}
        assert transport is not None

        def receive(parcel: Parcel) -> Any:
            return transport.receive(parcel.peer, Channel.BANDS, self._layouts[parcel])

        early = [(p.peer, receive(p)) for p in phase.receives] if transport.posts_early else []
        for parcel in phase.sends:
            transport.send(parcel.peer, Channel.BANDS, self._layouts[parcel], outgoing[parcel.peer])
        expected = early or [(p.peer, receive(p)) for p in phase.receives]
        return {peer: incoming.wait() for peer, incoming in expected}

    def _static_input(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):
            return torch.ones(tuple(shape), dtype=dtype, device=self._device)


def join_bands(bands: Sequence[Tensor], programs: Sequence[BandProgram]) -> Tensor:
    """The image from every rank's part."""
    rows = programs[0].rows
    return bands[0] if rows is None else torch.cat(list(bands), rows[0])


@torch.no_grad()
def run_side_by_side(runners: Sequence[BandRunner], latents: Tensor) -> Tensor:
    """All ranks' programs in one process, phase by phase: what the ranks compute together."""
    marches = [runner.march(latents) for runner in runners]
    outgoing = [next(march) for march in marches]
    bands: list[Tensor] = []
    while not bands:
        arrived: list[dict[int, list[Tensor]]] = [{} for _ in runners]
        for rank, parcels in enumerate(outgoing):
            for peer, tensors in parcels.items():
                arrived[peer][rank] = [tensor.clone() for tensor in tensors]
        outgoing = []
        for march, incoming in zip(marches, arrived):
            try:
                outgoing.append(march.send(incoming))
            except StopIteration as done:
                bands.append(done.value)
    return join_bands(bands, [runner.program for runner in runners])
