"""How far roofline estimates are off: between measured GPUs, and against the paper's figures.

    python tools/check_roofline.py A/sdxl.json B/sdxl.json [--paper sdxl=A/sdxl.json --paper sd3=A/sd3.json] [--json F]

Each of the two profiles (same denoiser, two kinds of GPU) is predicted from the other one, by what carries over layer
by layer, and by the three fitted efficiencies alone. With --paper, runs on two RTX 3090 are predicted from a measured
profile (or taken from one that was itself estimated for rtx3090-pcie3) and printed beside what the paper reports (50
steps; its schedules, with warm-up until the cap).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hybridiff_compiler.ir import Profile
from hybridiff_compiler.planner import candidate_partitions, measured_patterns, step_cost
from hybridiff_compiler.profiler.roofline import device_of, estimate_layers, estimate_profile, fit_efficiency

# arXiv 2602.21760: seconds of one generation on two RTX 3090, by parallelism steps k (None: branches split only).
PAPER: dict[str, tuple[float, dict[int | None, float]]] = {
    "sdxl": (16.49, {None: 9.24, 5: 7.12, 10: 6.89, 20: 6.44, 30: 5.94}), "sd3": (19.36, {5: 9.33}),
}


def tables(graph: Any, seconds: Any) -> Any:
    """Two-rank tables."""
    partitions = candidate_partitions(graph, seconds, (2,))
    return partitions, measured_patterns(partitions, (2,))


def transfer(source: Profile, target: Profile) -> dict[str, Any]:
    """Errors of predicting `target` from `source`, relative to what was measured."""
    estimate = estimate_profile(source.model, source.graph, device_of(target), tables, fit=source)
    efficiency = fit_efficiency(source)
    row: dict[str, Any] = {
        "from": source.provenance.device, "to": target.provenance.device, "model": source.model.name,
        "efficiency": {"arithmetic": 1 / efficiency.arithmetic, "memory": 1 / efficiency.memory,
                       "start_us": 1e6 * efficiency.start_s},
    }
    for batch, measured in target.costs.layers.items():
        total = sum(measured)
        plain = estimate_layers(source.graph, source.model.dtype, batch, device_of(target), efficiency)
        for kind, predicted in (("by layer", estimate.costs.layers[batch]), ("fit only", plain)):
            row[f"batch {batch}, {kind}"] = {
                "whole": sum(predicted) / total - 1,
                "layers": sum(abs(p - m) for p, m in zip(predicted, measured)) / total,
            }
    return row


def paper(name: str, source: Profile) -> list[dict[str, Any]]:
    """Predicted and published speed-ups on two RTX 3090."""
    from hybridiff_compiler.profiler.devices import DEVICES

    there = source
    if source.provenance.estimated is None:
        fit = source.model_copy(update={"errors": ()})
        there = estimate_profile(source.model, source.graph, DEVICES["rtx3090-pcie3"], tables, fit=fit)
    steps = 50
    seconds = {pattern.name: step_cost(there, pattern).latency_s for pattern in there.patterns}
    window = next(n for n in ("paper:nested", "paper:linear") if n in seconds)
    single, published = PAPER[name]
    rows = [{"model": name, "row": "one GPU", "predicted_s": steps * seconds["single"], "published_s": single}]
    for count, latency in published.items():
        predicted = (steps - (count or 0)) * seconds["branch"] + (count or 0) * seconds[window]
        rows.append({
            "model": name, "row": "branch" if count is None else f"paper k={count}", "predicted_s": predicted,
            "published_s": latency, "predicted_speedup": steps * seconds["single"] / predicted,
            "published_speedup": single / latency,
        })
    return rows


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="*", type=Path, help="two profiles of one denoiser on two kinds of GPU")
    parser.add_argument("--paper", action="append", default=[], metavar="NAME=PROFILE", help="sdxl=FILE or sd3=FILE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"transfers": [], "paper": []}
    if len(arguments.profiles) == 2:
        first, second = (Profile.load(file) for file in arguments.profiles)
        result["transfers"] = [transfer(first, second), transfer(second, first)]
    for entry in arguments.paper:
        name, _, file = entry.partition("=")
        result["paper"] += paper(name, Profile.load(file))
    for row in result["transfers"]:
        share = row["efficiency"]
        print(f"{row['model']}: {row['from']} -> {row['to']} (arithmetic {share['arithmetic']:.0%}, memory "
              f"{share['memory']:.0%}, {share['start_us']:.1f} us per layer)")
        for key, error in row.items():
            if key.startswith("batch"):
                print(f"  {key}: whole {error['whole']:+.1%}, layers off by {error['layers']:.1%} of the time")
    for row in result["paper"]:
        both = [row.get("predicted_speedup"), row.get("published_speedup")]
        speedup = "" if None in both else f"  {both[0]:.2f}x / {both[1]:.2f}x"
        print(f"{row['model']:5s} {row['row']:12s} predicted / published {row['predicted_s']:.2f} / "
              f"{row['published_s']:.2f} s{speedup}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
