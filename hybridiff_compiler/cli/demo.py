"""`hybridiff demo`: the whole flow on the bundled models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..ir import Profile
    from ..quality.compare import Comparison
    from ..quality.contenders import Contender
    from ..report import ModelResults
    from .models import LoadedModel
    from .output import Output

__all__ = ["command"]

_REPEATS = 3
"""Timed generations per row; the latency is their median."""
_THREADS = 1
"""One rank is one thread, so that two ranks against one is a fair comparison on two cores."""


def command(
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for images, plans and JSON.")] = Path("demo-out"),
    reprofile: Annotated[bool, typer.Option("--reprofile", help="Measure here, use no shipped profile.")] = False,
    profiles: Annotated[Path | None, typer.Option(
        help="Folder with unet.json and mmdit.json to use instead of the shipped profiles.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=32, help="Held-out prompts to judge by.")] = 8,
    models: Annotated[str, typer.Option(help="Bundled models, separated by commas.")] = "unet,mmdit",
    json_mode: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Profile, plan, run and compare the bundled models on two processes of one thread each; needs no GPU."""
    from ..ir import UsageError
    from ..quality.contenders import contenders
    from ..reference_models import path
    from ..report import ModelResults, Results
    from ..runtime.intercept import find_denoiser
    from .files import check_folder
    from .models import load_model
    from .output import opened

    if reprofile and profiles is not None:
        raise UsageError("--reprofile measures and --profiles reads; give one of them")
    names = list(dict.fromkeys(name.strip() for name in models.split(",") if name.strip()))
    if not names:
        raise UsageError("got no models; give --models unet,mmdit or one of them")
    for name in names:
        path(name)
    check_folder(out_folder)
    with opened(json_mode) as out:
        from ..profiler.session import device_name

        known = {} if reprofile else {name: _read_profile(name, profiles) for name in names}
        results: dict[str, ModelResults] = {}
        shown: list[RenderableType] = []
        for name in names:
            loaded = load_model(f"bundled:{name}")
            folder = out_folder / name
            check_folder(folder)
            profile = known[name] if name in known else _measure(loaded, folder, out)
            rows = contenders(profile)
            comparison = _compare(loaded, profile, rows, prompts, out)
            _write(folder, loaded, rows, comparison, prompts)
            results[name] = ModelResults(rows=tuple(measured.row for measured in comparison.rows))
            shown += _describe(name, profile, results[name], comparison)
        final = Results(device=device_name(next(find_denoiser(loaded.pipe)[1].parameters()).device), models=results)
        final.save(out_folder / "demo.json")
        out.result(*shown, f"\nimages, plans and JSON are in {out_folder}", machine=final.to_json)


def _read_profile(name: str, folder: Path | None) -> Profile:
    from ..ir import Profile
    from .shipped import shipped_profile

    return Profile.load(shipped_profile(name) if folder is None else folder / f"{name}.json")


def _measure(loaded: LoadedModel, folder: Path, out: Output) -> Profile:
    from ..api import profile

    with out.progress() as on_progress:
        measured = profile(
            loaded.pipe, prompts=loaded.profiling_prompts, name=loaded.name,
            num_inference_steps=loaded.num_inference_steps, guidance_scale=loaded.guidance_scale, threads=_THREADS,
            on_progress=lambda stage, done, total: on_progress(f"{loaded.name}: {stage}", done, total),
            **loaded.options,
        )
    measured.save(folder / "profile.json")
    return measured


def _compare(
    loaded: LoadedModel, profile: Profile, rows: Sequence[Contender], prompts: int, out: Output
) -> Comparison:
    from ..profiler.generate import Generation
    from ..quality.compare import compare

    generation = Generation(
        pipe=loaded.pipe, num_inference_steps=profile.num_steps, guidance_scale=profile.guidance_scale,
        options=loaded.options,
    )
    with out.progress(one_bar=True) as on_progress:
        return compare(
            generation, rows, loaded.held_out_prompts[:prompts], threads=_THREADS, repeats=_REPEATS,
            on_progress=lambda stage, done, total: on_progress(f"{loaded.name}: {stage}", done, total),
        )


def _write(
    folder: Path, loaded: LoadedModel, rows: Sequence[Contender], comparison: Comparison, prompts: int
) -> None:
    """Plans, and the images of every row that made one per prompt, side by side."""
    from ..ir import write_atomically
    from ..report import image_grid

    for row in rows:
        row.plan.save(folder / f"plan-{row.name}.json")
    texts = loaded.held_out_prompts[:prompts]
    columns = {each.row.name: each.images for each in comparison.rows if len(each.images) == len(texts)}
    picture = image_grid(columns, texts, title=f"{loaded.name}: the same seeds, by schedule")
    write_atomically(folder / "images.png", lambda file: picture.save(file))


def _describe(
    name: str, profile: Profile, results: ModelResults, comparison: Comparison
) -> list[RenderableType]:
    from rich.text import Text

    from ..report import legend, letters, results_table, strip

    alphabet = letters(pattern for each in comparison.rows for pattern in each.row.patterns)
    title = f"bundled:{name}, {profile.num_steps} steps, {len(comparison.rows[0].images)} prompts, one thread per rank"
    lines: list[RenderableType] = [results_table(f"\n{title}", results, alphabet=alphabet), Text(legend(alphabet))]
    lines += [Text(f"{each.row.name:<22}{strip(each.steps[0], alphabet)}") for each in comparison.rows]
    branch = results.row("branch").max_abs_diff
    lines.append(Text("branch: bit-identical to one process that evaluates the branches one by one; largest difference "
                      f"from the unmodified pipeline, which batches them: {branch:.1e}"))
    for each in comparison.rows:
        if len(set(each.steps)) > 1:
            strips = sorted({strip(steps, alphabet) for steps in each.steps})
            lines.append(Text(f"{each.row.name} found its window per prompt: " + "  ".join(strips)))
    if profile.provenance.random_weights:
        lines.append(Text("random weights: only the times mean anything", style="bold"))
    return lines
