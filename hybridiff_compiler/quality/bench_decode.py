"""How long the decode of an image takes: by the VAE as it comes, as one compiled graph, in bands on several GPUs."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from ..ir import Data, write_text_atomically
from ..ir.versions import installed_versions
from ..profiler.session import device_name
from ..report.results import parsed
from ..runtime.decode_ranks import DecodeCall, DecodeRank, decoder_to_share
from ..runtime.decode_worker import DecodeRanks
from ..runtime.memory import peak_bytes

__all__ = ["DecodeResults", "DecodeRow", "bench_decode", "decode_results"]

Progress = Callable[[str, int, int], None]


class DecodeRow(Data):
    """One way to decode the same latents."""

    name: str
    """`eager` (the VAE's own decode), `compiled` (one graph on one rank), `rows-N` (bands on N ranks)."""
    ranks: int = Field(ge=1)
    backend: str | None = None
    """null: the VAE as it comes."""
    dtype: str
    """Of latents and weights."""
    pixels: int = Field(ge=1)
    """Height of the image."""
    decode_s: float
    """Median."""
    speedup: float | None = None
    """Over `eager`."""
    rounds: int | None = None
    """How often neighbours exchange something."""
    sent_bytes: int | None = None
    """By rank 0, to other ranks, in one decode."""
    share: float | None = None
    """Arithmetic of the busiest rank as a share of the whole."""
    max_abs_diff: float | None = None
    """Largest difference of a pixel (values in [-1, 1]) from `eager`."""
    mean_abs_diff: float | None = None
    peak_gib: float | None = None
    """Memory of rank 0 so far in the run."""


class DecodeResults(Data):
    """One run of `hybridiff bench --decode`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    device: str
    versions: dict[str, str]
    seed: int
    random_weights: bool
    models: dict[str, tuple[DecodeRow, ...]]

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON, atomically."""
        return write_text_atomically(path, self.model_dump_json(indent=1, by_alias=True) + "\n")

    @classmethod
    def parse(cls, payload: Any, *, source: str) -> DecodeResults:
        """As `report.Results.parse`."""
        return parsed(cls, payload, source)


def decode_results(
    rows: Mapping[str, tuple[DecodeRow, ...]], *, device: str, seed: int, random_weights: bool
) -> DecodeResults:
    """The document of a run: rows by model, and what they were measured on."""
    return DecodeResults(
        device=device_name(torch.device(device)), seed=seed, random_weights=random_weights, models=dict(rows),
        versions=installed_versions("torch", "diffusers", "hybridiff-compiler"),
    )


@torch.no_grad()
def bench_decode(
    vae: nn.Module, latents: Tensor, *, gpus: int, backend: str, repeats: int = 10, threads: int = 1,
    on_progress: Progress = lambda what, done, total: None,
) -> Iterator[DecodeRow]:
    """Rows `eager`, `compiled`, and `rows-N` for N = 2, 4, ... up to `gpus`.

    Args:
        vae: with a method `decode`, on the first rank's device, its weights in the dtype to decode in.
        latents: of one image, on that device.
        gpus: ranks.
        backend: of the compiled rows, see `hybridiff_compiler.backends`.
        repeats: timed decodes per row, after three that warm up.
        threads: CPU threads per rank.
        on_progress: called with (what, done, total).

    Raises:
        InputError: the decoder cannot be captured, or nothing of it can be computed on bands.
        UsageError: the image is too low for so many ranks.
    """
    plain: Any = vae
    device = latents.device
    call = DecodeCall(tuple(latents.shape), str(latents.dtype).removeprefix("torch."))
    reference, eager_s = _timed(lambda: plain.decode(latents, return_dict=False)[0], device, repeats)
    common: dict[str, Any] = {"dtype": call.dtype, "pixels": reference.shape[-2]}
    yield DecodeRow(
        name="eager", ranks=1, decode_s=eager_s, speedup=1.0, peak_gib=peak_bytes(device) / 2**30, **common)

    def row(name: str, rank: DecodeRank, decode: Callable[[], Tensor]) -> DecodeRow:
        image, seconds = _timed(decode, device, repeats)
        apart = (image.float() - reference.float()).abs()
        program = rank.runner.program
        return DecodeRow(
            name=name, ranks=rank.ranks, backend=backend, decode_s=seconds, speedup=eager_s / seconds,
            rounds=len(program.phases) - 1, sent_bytes=program.sent_bytes, share=rank.graph.share(rank.ranks),
            max_abs_diff=float(apart.max()), mean_abs_diff=float(apart.mean()),
            peak_gib=peak_bytes(device) / 2**30, **common,
        )

    decoder = decoder_to_share(vae, call.shape, call.torch_dtype)
    alone = DecodeRank(decoder, call, rank=0, ranks=1, device=device, backend=backend)
    alone.prepare(lambda done, total: on_progress("building the graph of the decoder", done, total))
    yield row("compiled", alone, lambda: alone.decode(latents, None))
    count = 2
    while count <= gpus:
        with DecodeRanks(
            vae, call, ranks=count, backend=backend, threads=threads, on_progress=on_progress
        ) as ranks:
            yield row(f"rows-{count}", ranks.rank, lambda: ranks.decode(latents))
        count *= 2


def _timed(decode: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[Tensor, float]:
    """The last image, and the median time from the call until the image is there."""
    seconds = []
    for _ in range(3 + repeats):
        _wait(device)
        begin = time.perf_counter()
        image = decode()
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return image, statistics.median(seconds[3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
