"""Where the time of a step goes: how long stage graphs take inside a generation, and what happens between them.

    hybridiff bench sdxl --random-weights --row branch --trace traces
    python tools/trace_gaps.py traces/sdxl-branch.json.gz [--json OUT]

All kernels of one replay of a stage graph have one correlation number in the trace. Per rank: the replays of the
largest graphs, their duration, the pause between two of them, and the kernels in the pauses (transfers wait there).
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

FEWEST = 50
"""Kernels of a replay that counts as a stage graph."""
SHOWN = 12


def analyse(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Replays and pauses of every rank, in microseconds."""
    ranks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            ranks[event["pid"].partition(",")[0]].append(event)
    return {rank: _rank(sorted(found, key=lambda e: float(e["ts"]))) for rank, found in sorted(ranks.items())}


def _rank(events: list[dict[str, Any]]) -> dict[str, Any]:
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        groups[event["args"].get("correlation", -1)].append(event)
    replays = sorted(
        (min(float(e["ts"]) for e in group), max(float(e["ts"]) + float(e["dur"]) for e in group), len(group), number)
        for number, group in groups.items() if len(group) >= FEWEST
    )
    inside = {number for *_, number in replays}
    others = [event for event in events if event["args"].get("correlation", -1) not in inside]
    pauses = [after[0] - before[1] for before, after in itertools.pairwise(replays)]
    between: dict[str, list[float]] = defaultdict(list)
    for event in others:
        between[event["name"][:70]].append(float(event["dur"]))
    origin = float(events[0]["ts"])
    return {
        "replays": len(replays), "kernels": sorted({count for _, _, count, _ in replays}),
        "first_after_us": replays[0][0] - origin if replays else None,
        "duration_us": [round(end - begin, 1) for begin, end, _, _ in replays],
        "pause_us": [round(pause, 1) for pause in pauses],
        "after_last_us": max(float(e["ts"]) + float(e["dur"]) for e in events) - replays[-1][1] if replays else None,
        "between": {
            name: {"count": len(times), "sum_us": round(sum(times), 1), "median_us": round(statistics.median(times), 1)}
            for name, times in sorted(between.items(), key=lambda item: -sum(item[1]))
        },
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with gzip.open(arguments.trace, "rt") as stream:
        found = analyse(json.load(stream)["traceEvents"])
    for rank, facts in found.items():
        durations, pauses = facts["duration_us"], facts["pause_us"]
        print(f"{rank}: {facts['replays']} replays of graphs with {facts['kernels']} kernels")
        if len(durations) > 1:
            print(f"  replay: median {statistics.median(durations):.0f} us, mean {statistics.mean(durations):.0f}, "
                  f"{min(durations):.0f} to {max(durations):.0f}; pause: median {statistics.median(pauses):.0f} us, "
                  f"mean {statistics.mean(pauses):.0f}, {min(pauses):.0f} to {max(pauses):.0f}")
            print(f"  first replay {facts['first_after_us']:.0f} us after the first kernel, "
                  f"{facts['after_last_us']:.0f} us of kernels after the last one")
        for name, times in list(facts["between"].items())[:SHOWN]:
            print(f"    {times['sum_us']:9.0f} us in {times['count']:5d}, median {times['median_us']:7.1f}  {name}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"kind": "trace-gaps", "ranks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
