"""Predicted against measured latency of schedules on this machine's GPUs.

    hybridiff profile sdxl --costs-only --random-weights --device cuda -o sdxl.json
    hybridiff bench sdxl --random-weights --profile sdxl.json -o bench.json
    python tools/check_latency.py bench.json sdxl.json [MORE_PROFILES] [--json OUT]

Every row of the benchmark but the uncompiled one is predicted by the planner's cost model from the profile alone: stage
times, links, overhead of a step. The rows should have been measured with the profile's partitions (`--profile`);
others, marked with a star, ran on stages balanced by arithmetic, which may differ from those predicted. Exit code 0
when every row with several ranks is within 5 %, else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hybridiff_compiler.ir import Profile
from hybridiff_compiler.planner.cost import CostModel
from hybridiff_compiler.planner.patterns import generate_patterns
from hybridiff_compiler.quality.bench import predicted_seconds

WITHIN = 0.05


def compare(name: str, rows: list[dict[str, Any]], profile: Profile) -> list[dict[str, Any]]:
    """Predicted and measured seconds of a model's rows."""
    known = {p.name: p for p in (*generate_patterns(profile.partitions, 2), *profile.patterns)}
    model = CostModel(profile)
    found = []
    for row in rows:
        if row["name"] == "single-eager" or any(pattern not in known for pattern in row["patterns"]):
            continue
        predicted, measured = predicted_seconds(profile, row["patterns"]), row["loop_s"]
        ideal = {pattern: model.step(known[pattern]).ideal_s for pattern in row["patterns"]}
        stages = row.get("stage_s") or {}
        found.append({
            "model": name, "row": row["name"], "ranks": row["ranks"], "measured_s": measured, "predicted_s": predicted,
            "deviation": predicted / measured - 1, "same_partitions": row.get("predicted_s") is not None,
            "stage_deviation": {p: ideal[p] / stages[p] - 1 for p in ideal if stages.get(p)},
            "overhead_fraction": row.get("overhead_fraction"),
        })
    return found


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("profiles", nargs="+", type=Path, help="of the models in it, by name")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bench = json.loads(arguments.bench.read_text())
    result: list[dict[str, Any]] = []
    for file in arguments.profiles:
        profile = Profile.load(file)
        if profile.model.name not in bench["models"]:
            parser.error(f"{file} is of {profile.model.name}, which is not among {', '.join(bench['models'])}")
        print(f"{profile.model.name}: rows on {bench['gpus']}x {bench['device']}, profile of "
              f"{profile.provenance.device}, {len(profile.costs.links)} links")
        rows = compare(profile.model.name, bench["models"][profile.model.name]["rows"], profile)
        for row in rows:
            stages = ", ".join(f"{p} {d:+.1%}" for p, d in row["stage_deviation"].items())
            extra = row["overhead_fraction"]
            overhead = "" if extra is None else f"; loop over its graphs {extra:+.1%}"
            print(f"  {row['row'] + ('' if row['same_partitions'] else '*'):18s} predicted {row['predicted_s']:.3f} s, "
                  f"measured {row['measured_s']:.3f} s, {row['deviation']:+.1%}"
                  + (f"; stages {stages}" if stages else "") + overhead)
        result += rows
    worst = max((abs(row["deviation"]) for row in result if row["ranks"] > 1), default=0.0)
    print(f"largest deviation with several ranks {worst:.1%}: {'holds' if worst <= WITHIN else 'DOES NOT HOLD'} "
          f"(within {WITHIN:.0%})")
    if arguments.json is not None:
        text = json.dumps({"kind": "latency-check", "worst": worst, "rows": result}, indent=1)
        arguments.json.write_text(text + "\n")
    return 0 if worst <= WITHIN else 1


if __name__ == "__main__":
    sys.exit(main())
