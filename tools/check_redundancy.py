"""Does what a cut loses by being read one step old tell how much a step errs that is run so? Measured on many cuts.

    python tools/check_redundancy.py profiles/cpu/unet.json bundled:unet -o check.json

Takes the nested two-stage cuts whose slower stage is within --slack of the best balance (by the profile's layer times),
and the linear ones; measures the image error of single steps that read across them one step old, as a profile does; and
compares it with what the partitioner may rank cuts by: all bytes that cross, the change of what the estimate's stage
reads (mean, bytes-weighted), and bytes times change. Then the cuts that it chooses with and without knowing changes.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridiff_compiler.ir import Partition, Pattern, Profile, Redundancy
from hybridiff_compiler.planner import nested
from hybridiff_compiler.planner.layer_times import inner_runs
from hybridiff_compiler.planner.staleness import lost_bytes, stale_tables

MEASURES = ("bytes", "change", "bytes x change")


def main(
    profile: Annotated[Path, typer.Argument(help="A profile with layer times and pattern errors.")],
    model: Annotated[str, typer.Argument(help="The model that it is about, e.g. bundled:unet.")],
    slack: Annotated[float, typer.Option(min=0, help="How much slower than the best balance a cut may be.")] = 0.05,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts whose errors are measured.")] = 2,
    surveys: Annotated[int, typer.Option(min=2, help="Prompts whose changes are surveyed, each by itself.")] = 12,
    stride: Annotated[int, typer.Option(min=1, help="Every so many steps are measured.")] = 6,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
) -> None:
    """Print rank correlations with the errors, and the errors of the cuts that would be chosen."""
    import torch
    from scipy.stats import spearmanr

    from hybridiff_compiler.cli.models import load_model
    from hybridiff_compiler.profiler import Generation
    from hybridiff_compiler.profiler.partial import Partial
    from hybridiff_compiler.profiler.redundancy import SURVEYED_PROMPTS, survey_redundancy
    from hybridiff_compiler.runtime.intercept import find_denoiser
    from hybridiff_compiler.runtime.segments import SegmentRunner

    torch.set_num_threads(threads)
    known, loaded = Profile.load(profile), load_model(model)
    denoiser = find_denoiser(loaded.pipe)[1].requires_grad_(False)
    generation = Generation(
        pipe=loaded.pipe, num_inference_steps=known.num_steps, guidance_scale=known.guidance_scale,
        seed=known.provenance.seed, options=loaded.options,
    )
    captured = SegmentRunner(denoiser, known.model.signature, (), ()).captured(1)
    several = [
        survey_redundancy(captured, generation, [prompt], Partial(None, {})).mean
        for prompt in loaded.profiling_prompts[:surveys]
    ]
    change = {name: statistics.fmean(each[name] for each in several[:SURVEYED_PROMPTS]) for name in several[0]}
    alike = statistics.median(
        float(spearmanr([one[name] for name in change], [other[name] for name in change]).statistic)
        for one, other in combinations(several, 2)
    )
    spread = statistics.median(
        statistics.pstdev(values) / statistics.fmean(values)
        for values in ([each[name] for each in several] for name in change) if any(values)
    )
    print(f"{len(change)} values, {len(several)} prompts: changes differ by {spread:.0%} between them (standard "
          f"deviation, median value); two rank the values alike to {alike:.2f} (median)", flush=True)

    cuts, straight = nested_cuts(known, slack), linear_cuts(known, slack)
    rows = judged(known, generation, loaded.profiling_prompts[:prompts], [*cuts, *straight], change, stride)
    of_cut = {row["cut"]: row for row in rows}
    ranked = [of_cut[cut.name] for cut in cuts]
    errors = [row["error_db"] for row in ranked]
    line = statistics.pstdev([of_cut[cut.name]["error_db"] for cut in straight])
    print(f"{len(straight)} linear cuts: standard deviation of their errors {line:.3f} dB")
    print(f"{len(cuts)} nested cuts within {slack:.0%}: {min(errors):.2f} to {max(errors):.2f} dB, "
          f"mean {statistics.fmean(errors):.2f}")
    correlations = {
        measure: float(spearmanr(errors, [row[measure] for row in ranked]).statistic) for measure in MEASURES
    }
    print("rank correlation with the error: " + ", ".join(f"{k} {v:+.2f}" for k, v in correlations.items()))
    seconds, chosen = known.costs.layers[1], {}
    for label, how in (
        ("fastest", {}), ("fewest bytes", {"slack": slack}), ("least lost", {"slack": slack, "change": change}),
    ):
        cut = nested(known.graph, seconds, **how)
        row = next(of_cut[each.name] for each in cuts if each.stages == cut.stages)
        chosen[label] = row
        print(f"chosen, {label}: {row['cut']}, error {row['error_db']:.2f} dB, slower stage {row['slower']:.1%}")
    alone = Counter(
        next(cut.name for cut in cuts if cut.stages == nested(known.graph, seconds, slack=slack, change=each).stages)
        for each in several
    )
    print("least lost by the changes of one prompt: " + ", ".join(
        f"{cut} {count} times ({of_cut[cut]['error_db']:.2f} dB)" for cut, count in alone.most_common()
    ))
    if output is not None:
        output.write_text(json.dumps({
            "schema": 1, "kind": "redundancy-check", "model": model, "profile_sha256": known.digest(), "slack": slack,
            "prompts": prompts, "surveys": surveys, "surveys_alike": alike,
            "change_spread": spread, "chosen_by_one_prompt": dict(alone), "linear_std_db": line,
            "correlations": correlations, "chosen": chosen, "cuts": rows,
        }, indent=1) + "\n")


def nested_cuts(profile: Profile, slack: float) -> list[Partition]:
    """All inner runs within `slack` of the best balance."""
    names, seconds = profile.graph.names, profile.costs.layers[1]
    strict, loose = inner_runs(profile.graph)
    allowed = strict if strict.any() else loose
    runs = {
        (i, j): max(inner := sum(seconds[i:j]), sum(seconds) - inner)
        for i in range(len(names)) for j in range(i + 1, len(names) + 1) if allowed[i, j]
    }
    return [
        Partition(name=f"nested-{i}-{j}", stages=(names[i:j], names[:i] + names[j:]))
        for (i, j), slower in runs.items() if slower <= min(runs.values()) * (1 + slack)
    ]


def linear_cuts(profile: Profile, slack: float) -> list[Partition]:
    """The best linear cut, its neighbours, and all others within `slack`."""
    names, seconds = profile.graph.names, profile.costs.layers[1]
    slower = {i: max(sum(seconds[:i]), sum(seconds[i:])) for i in range(1, names.index(profile.graph.output) + 1)}
    best = min(slower, key=slower.__getitem__)
    return [
        Partition(name=f"linear-{i}", stages=(names[:i], names[i:]))
        for i in slower if slower[i] <= slower[best] * (1 + slack) or abs(i - best) <= 1
    ]


def judged(
    profile: Profile, generation: Any, prompts: Sequence[str], cuts: Sequence[Partition], change: dict[str, float],
    stride: int,
) -> list[dict[str, Any]]:
    """Per cut: measured error of a step of both branches across it, and what it may be ranked by."""
    from hybridiff_compiler.profiler.errors import ErrorMeasurement, ErrorSettings
    from hybridiff_compiler.profiler.grid import Grid
    from hybridiff_compiler.profiler.partial import Partial

    tables = [pattern for pattern in profile.patterns if pattern.is_exact]
    for cut in cuts:
        table = next(p for p in profile.patterns if p.name == f"pipe:{cut.name.partition('-')[0]}")
        tables.append(Pattern.model_validate(table.model_dump() | {"name": f"pipe:{cut.name}", "partition": cut.name}))
    measured = ErrorMeasurement(
        generation, prompts, None, profile.model.signature, cuts, tables,
        ErrorSettings(probes=2, curve_prompts=len(prompts), grid=Grid(ages=(1,), stride=stride, edge=1)),
        Partial(None, {}),
    ).curves()
    judged_cuts = profile.model_copy(update={
        "partitions": tuple(cuts), "patterns": tuple(tables), "errors": measured.errors,
        "redundancy": Redundancy(change={name: (value,) for name, value in change.items()}),
    })
    found = {table.pattern.partition(":")[2]: table for table in stale_tables(judged_cuts)}
    graph, seconds = profile.graph, dict(zip(profile.graph.names, profile.costs.layers[1]))
    rows = []
    for cut in cuts:
        read, back = cut.received(graph, 0, (1,)), cut.received(graph, 1, (0,))
        lost = lost_bytes(read, change) or 0.0
        rows.append({
            "cut": cut.name, "error_db": found[cut.name].error_db,
            "slower": max(sum(seconds[name] for name in stage) for stage in cut.stages) / sum(seconds.values()),
            "bytes": sum(value.nbytes for value in (*read, *back)), "bytes x change": lost,
            "change": lost / sum(value.nbytes for value in read),
        })
    return rows


if __name__ == "__main__":
    typer.run(main)
