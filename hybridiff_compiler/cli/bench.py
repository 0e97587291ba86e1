"""`hybridiff bench`: how fast this machine runs models, on one GPU and by plans on several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ..ir import UsageError

__all__ = ["command"]


def command(
    models: Annotated[list[str], typer.Argument(
        metavar="MODEL...", help="As for profile; with --random-weights names of architectures: sdxl, sd3.")],
    random_weights: Annotated[bool, typer.Option(
        "--random-weights", help="No weights are loaded: latency is real, images mean nothing.")] = False,
    pixels: Annotated[int, typer.Option(min=8, help="Image width and height.")] = 1024,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 50,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks of the plans.")] = 2,
    rows: Annotated[list[str] | None, typer.Option("--row", help="Measure only this row; repeat for more.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed generations per row, after one to warm up.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    backend: Annotated[str | None, typer.Option(
        show_default="inductor on cuda, eager on cpu", help="eager or inductor.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per rank.")] = None,
    profile: Annotated[list[Path] | None, typer.Option(
        help="A profile of one of the MODELs by the same name: use its partitions, print its predictions; repeat for "
        "more.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, embeddings and latents.")] = 0,
    decoder: Annotated[str, typer.Option(
        help="Who decodes where whole calls are timed: pipeline, driver, rows or auto.")] = "pipeline",
    decode: Annotated[bool, typer.Option(
        "--decode", help="Time the decode of the VAE instead: as it comes, compiled, and in bands of rows.")] = False,
    decode_dtype: Annotated[str | None, typer.Option(
        show_default="what the pipeline decodes in", help="With --decode: float32, float16 or bfloat16.")] = None,
    trace: Annotated[Path | None, typer.Option(
        metavar="FOLDER", help="Record a generation by the row `branch` on all GPUs there; see tools/trace_gaps.py.",
    )] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The results to write (JSON).")] = None,
    json_mode: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time the denoising loop of MODELs: as it comes, compiled on one GPU, and by plans on several."""
    from .calls import check_backend, check_device
    from .files import check_writable
    from .output import opened

    check_device(device)
    check_backend(backend)
    if trace is not None and device != "cuda":
        raise UsageError("traces are recorded on GPUs; drop --trace, or measure with --device cuda")
    check_writable(output)
    with opened(json_mode) as out:
        if decode:
            from .bench_decode import run_decode_bench

            run_decode_bench(
                out, models, random_weights=random_weights, pixels=pixels, gpus=gpus, repeats=repeats, device=device,
                backend=backend, threads=threads, seed=seed, output=output, dtype=decode_dtype,
            )
            return
        from ..ir import Profile
        from ..quality.bench import Bench, bench_results, default_rows
        from ..report import bench_tables

        profiles = {known.model.name: known for known in map(Profile.load, profile or ())}
        if unknown := set(profiles) - set(models):
            raise UsageError(f"got a profile of {min(unknown)}, which is not benchmarked; got {', '.join(models)}")
        benches = {}
        with out.progress() as on_progress:
            for model in models:
                pipe, options = _load(model, random_weights, device, pixels, seed)
                bench = Bench(
                    pipe, options, name=model, pixels=pixels, steps=steps, gpus=gpus, repeats=repeats, backend=backend,
                    threads=threads, rows=rows or default_rows(gpus), profile=profiles.get(model),
                    decode=cast(Any, decoder), traces=trace,
                )
                with bench.open(on_progress) as measure:
                    benches[model] = tuple(measure())
        results = bench_results(benches, device=device, gpus=gpus, seed=seed, random_weights=random_weights)
        if output is not None:
            results.save(output)
        out.result(*bench_tables(results), machine=results.to_json)


def _load(model: str, random_weights: bool, device: str, pixels: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """The pipeline and the keyword arguments of a call that returns latents."""
    import torch

    from .calls import call_options
    from .models import load_model

    if random_weights:
        from ..quality.architectures import random_model

        torch.manual_seed(seed)
        built = random_model(
            model, device=device, dtype=torch.float16 if device == "cuda" else torch.float32, vae=True
        )
        return built.pipe, built.options(pixels, seed)
    loaded = load_model(model, device=device)
    options = call_options(loaded, pixels, pixels) | {"output_type": "latent", "guidance_scale": loaded.guidance_scale}
    prompt = loaded.held_out_prompts[0] if loaded.held_out_prompts else "a photograph"
    return loaded.pipe, options | {"prompt": prompt, "generator": torch.Generator().manual_seed(seed)}
