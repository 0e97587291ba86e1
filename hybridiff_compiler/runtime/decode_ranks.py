"""A decode on several ranks: what every rank builds, and how latents get there and the image back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.cuda_graph import Recorder, recorder_for
from ..capture.bands import band_bounds, band_program
from ..capture.decoder import capture_decoder, decode_parameters, decoder_only
from ..capture.rows import RowGraph, split_rows
from ..ir.errors import InputError
from .decode import BandRunner, join_bands
from .transport import Channel, Layout, Transport

__all__ = ["DecodeCall", "DecodeRank", "decode_dtype", "decoder_to_share"]


@dataclass(frozen=True)
class DecodeCall:
    """What one decode looks like."""

    shape: tuple[int, ...]
    """Of the latents, one image: [1, C, ..., H, W]."""
    dtype: str
    """torch dtype of latents and weights, without the prefix."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def to_json(self) -> dict[str, Any]:
        """For the start message."""
        return asdict(self)

    @classmethod
    def parse(cls, data: dict[str, Any]) -> DecodeCall:
        """The inverse of `to_json`."""
        return cls(tuple(data["shape"]), data["dtype"])


class DecodeRank:
    """One rank's part of decodes."""

    def __init__(
        self, decoder: nn.Module, call: DecodeCall, *, rank: int, ranks: int, device: torch.device, backend: str,
        recorder: Recorder | None = None, graph: RowGraph | None = None,
    ) -> None:
        """
        Args:
            decoder: a VAE, or what `decoder_to_share` made of one, with its weights.
            call: what is decoded.
            rank, ranks: of how many which one; 1 rank: the whole decode as one graph.
            device: where the decoder is.
            backend: see `hybridiff_compiler.backends`.
            recorder: default: CUDA graphs on CUDA.
            graph: of `decoder`, when it has been classified already.

        Raises:
            InputError: nothing of the decoder can be computed on bands of rows.
            UsageError: the image is too low for so many ranks.
        """
        self.call, self.rank, self.ranks = call, rank, ranks
        self.graph = graph or split_rows(capture_decoder(decoder, call.shape, call.torch_dtype))
        program = band_program(self.graph, rank, ranks, channels_last=device.type == "cuda")
        self.runner = BandRunner(
            program, device=device, backend=backend, recorder=recorder or recorder_for(device)
        )
        self._latents = Layout([(call.shape, call.torch_dtype)])
        self._bands = [Layout([(shape, program.dtype)]) for shape in self._shapes()]

    def _shapes(self) -> list[tuple[int, ...]]:
        program = self.runner.program
        if program.rows is None:
            return [program.shape] * self.ranks
        dim, begin, end = program.rows
        own_begin, own_end = band_bounds(self.graph.base, self.ranks)[self.rank]
        unit = (end - begin) // (own_end - own_begin)
        return [
            (*program.shape[:dim], (last - first) * unit, *program.shape[dim + 1:])
            for first, last in band_bounds(self.graph.base, self.ranks)
        ]

    def prepare(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile and record this rank's graphs; needs no other rank."""
        self.runner.prepare((self.call.shape, self.call.torch_dtype), on_progress)

    def decode(self, latents: Tensor, transport: Transport | None) -> Tensor:
        """On the driver: the image of `latents`; all other ranks must be told to `serve`.

        Raises:
            PeerError: a rank is gone or silent.
        """
        others = range(1, self.ranks)
        for peer in others:
            assert transport is not None
            transport.send(peer, Channel.INPUTS, self._latents, [latents])
        collects = self.runner.program.rows is not None
        early = self._expect(transport) if collects and transport is not None and transport.posts_early else []
        band = self.runner.run(latents, transport)
        if not collects or transport is None or self.ranks == 1:
            return band.clone() if self.runner.is_recorded else band
        bands = [band, *(incoming.wait()[0] for incoming in early or self._expect(transport))]
        return join_bands(bands, [self.runner.program])

    def serve(self, transport: Transport) -> None:
        """On another rank: its part of the decode that the driver has begun.

        Raises:
            PeerError: a rank is gone or silent.
        """
        (latents,) = transport.receive(0, Channel.INPUTS, self._latents).wait()
        band = self.runner.run(latents, transport)
        if self.runner.program.rows is not None:
            transport.send(0, Channel.ESTIMATES, self._bands[self.rank], [band])

    def _expect(self, transport: Transport) -> list[Any]:
        return [transport.receive(peer, Channel.ESTIMATES, self._bands[peer]) for peer in range(1, self.ranks)]


def decode_dtype(pipe: Any) -> torch.dtype:
    """What the pipeline decodes in: the VAE's own dtype, or float32 where it upcasts a float16 VAE by itself."""
    vae = pipe.vae
    upcasts = hasattr(pipe, "upcast_vae") and getattr(vae.config, "force_upcast", False)
    own: torch.dtype = next(vae.parameters()).dtype
    return torch.float32 if upcasts and own == torch.float16 else own


def decoder_to_share(vae: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> nn.Module:
    """What of `vae` decodes latents of `shape`, in `dtype`; by reference where its weights have that dtype.

    Raises:
        InputError: the decoder cannot be captured, or keeps some weights in another dtype.
    """
    own = next(vae.parameters()).dtype
    names = decode_parameters(capture_decoder(vae, shape, own))
    part = decoder_only(vae, names)
    if own != dtype:
        part = copy.deepcopy(part).to(dtype)
    kept = {parameter.dtype for parameter in part.parameters()}
    if kept != {dtype}:
        raise InputError(f"the decoder has weights in {sorted(map(str, kept))}, only one dtype is supported")
    return part
