"""`hybridiff bench --decode`: how long this machine takes from latents to an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from ..quality.bench_decode import DecodeResults
    from .output import Output

__all__ = ["decode_tables", "run_decode_bench"]


def run_decode_bench(
    out: Output, models: list[str], *, random_weights: bool, pixels: int, gpus: int, repeats: int, device: str,
    backend: str | None, threads: int | None, seed: int, output: Path | None, dtype: str | None,
) -> None:
    """Measure and print; the arguments are the options of `hybridiff bench`."""
    import torch

    from ..quality.bench_decode import bench_decode, decode_results

    benches = {}
    if threads is not None:
        torch.set_num_threads(threads)
    with out.progress() as on_progress:
        for model in models:
            vae, latents = _load(model, random_weights, device, pixels, seed, dtype)
            benches[model] = tuple(bench_decode(
                vae, latents, gpus=gpus, backend=backend or ("inductor" if device == "cuda" else "eager"),
                repeats=repeats, threads=threads or 1, on_progress=on_progress,
            ))
    results = decode_results(benches, device=device, seed=seed, random_weights=random_weights)
    if output is not None:
        results.save(output)
    out.result(*decode_tables(results), machine=results.to_json)


def _load(
    model: str, random_weights: bool, device: str, pixels: int, seed: int, dtype: str | None
) -> tuple[Any, Any]:
    """The VAE, and random latents for an image of this height and width."""
    import torch

    from ..ir import InputError, UsageError
    from ..quality.architectures import random_vae
    from ..runtime.decode_ranks import decode_dtype
    from .models import load_model, weights_dtype

    torch.manual_seed(seed)
    wanted = None if dtype is None else weights_dtype(device, dtype)
    if random_weights:
        vae: Any = random_vae(model, device=device, dtype=wanted)
    else:
        pipe = load_model(model, device=device).pipe
        if getattr(pipe, "vae", None) is None:
            raise InputError(f"{model}: the pipeline has no VAE")
        vae = pipe.vae.to(wanted or decode_dtype(pipe))
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if pixels % factor:
        raise UsageError(f"got {pixels} pixels; this VAE makes images whose height is a multiple of {factor}")
    parameter = next(vae.parameters())
    shape = (1, vae.config.latent_channels, pixels // factor, pixels // factor)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return vae, latents.to(parameter.device, parameter.dtype)


def decode_tables(results: DecodeResults) -> list[Table]:
    """One table per model."""
    from ..report import plain_table

    weights = ", random weights: latency only" if results.random_weights else ""
    tables = []
    for name, rows in results.models.items():
        table = plain_table(
            f"decode of {name} on {results.device}{weights}", "row", "backend", "dtype", "pixels", "ms", "vs eager",
            "rounds", "KiB sent", "largest difference", "peak GiB",
        )
        for row in rows:
            table.add_row(
                row.name, row.backend or "-", row.dtype, str(row.pixels), f"{1e3 * row.decode_s:.1f}",
                "-" if row.speedup is None else f"{row.speedup:.2f}x", "-" if row.rounds is None else str(row.rounds),
                "-" if row.sent_bytes is None else f"{row.sent_bytes / 1024:.0f}",
                "-" if row.max_abs_diff is None else f"{row.max_abs_diff:.1e}",
                "-" if row.peak_gib is None else f"{row.peak_gib:.1f}",
            )
        tables.append(table)
    return tables
