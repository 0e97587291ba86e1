"""Time and peak memory of planning over growing sizes, each part apart.

    python tools/bench_planner.py                 # the table; --json prints one JSON object
    python tools/bench_planner.py --case sdxl     # SDXL's U-Net on 8 unequal GPUs
    python tools/bench_planner.py --layers 400 --ranks 16 --steps 100

Every size runs in a process of its own, so that its peak memory (resident set, Python and its libraries included) is
its own. Layer times are arithmetic in place of measurements, and image errors are synthetic: the figures are those of
the planner, never of a model.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import typer

from hybridiff_compiler.ir import (
    CallSignature,
    Combine,
    Compounding,
    Costs,
    ErrorCurve,
    Layer,
    LayerGraph,
    LeafSpec,
    Link,
    ModelInfo,
    Partition,
    Pattern,
    PatternErrors,
    Profile,
    Provenance,
    RankSpec,
    Value,
)
from hybridiff_compiler.planner import Problem, Worker, candidate_partitions, divide, measured_patterns, solve_problem
from hybridiff_compiler.profiler.grid import GAPS, LONGEST_TREND

SDXL = "sdxl"
SIZES = ((50, 2, 50), (100, 4, 50), (200, 8, 50), (400, 16, 100), (1000, 64, 1000))
"""Layers, ranks, steps."""
PARTS = ("capture", "partitions", "divide", "patterns", "step costs", "frontier")
MAX_AGE = 8
_FLOPS_PER_S = 1e14


@dataclass
class Result:
    """One size."""

    case: str
    layers: int
    ranks: int
    steps: int
    seconds: dict[str, float] = field(default_factory=dict)
    """By part; `capture` is not planning and not in the total."""
    peak_mib: dict[str, float] = field(default_factory=dict)
    """Resident set at most until the end of the part."""
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def total_s(self) -> float:
        """Partitions, patterns, costs and frontier."""
        return sum(value for part, value in self.seconds.items() if part != "capture")

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """Do one part and note what it took."""
        began = time.perf_counter()
        outcome = work()
        self.seconds[name] = time.perf_counter() - began
        self.peak_mib[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return outcome


def main(
    case: Annotated[list[str] | None, typer.Option(help="sdxl or chain sizes; default: all.")] = None,
    layers: Annotated[int | None, typer.Option(min=4, help="One size: layers.")] = None,
    ranks: Annotated[int, typer.Option(min=1, max=64, help="One size: ranks, every other one at 3/4 speed.")] = 8,
    steps: Annotated[int, typer.Option(min=3, help="One size: denoising steps.")] = 50,
    json_mode: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    child: Annotated[bool, typer.Option("--child", hidden=True)] = False,
) -> None:
    """Print time and peak memory of every part of planning."""
    if layers is not None:
        wanted = [("unet", layers, ranks, steps)]
    else:
        wanted = [(SDXL, 0, 8, 50)] if case is None or SDXL in case else []
        wanted += [("unet", *size) for size in SIZES] if case is None or set(case) - {SDXL} else []
    if child:
        print(json.dumps(asdict(_plan(*wanted[0]))))
        return
    results = []
    for name, count, world, num_steps in wanted:
        size = ["--case", SDXL] if name == SDXL else [f"--layers={count}", f"--ranks={world}", f"--steps={num_steps}"]
        finished = subprocess.run(
            [sys.executable, __file__, *size, "--child"], check=True, capture_output=True, text=True
        )
        results.append(Result(**json.loads(finished.stdout.splitlines()[-1])))
        if not json_mode:
            _print(results[-1], header=len(results) == 1)
    if json_mode:
        print(json.dumps({"schema": 1, "errors": "synthetic", "cases": [
            {**asdict(result), "total_s": result.total_s} for result in results
        ]}))


def _print(result: Result, *, header: bool) -> None:
    if header:
        print(f"{'layers':>6} {'ranks':>5} {'steps':>5} {'tables':>6} {'points':>6} " + " ".join(
            f"{part + ' s':>12}" for part in PARTS) + f" {'total s':>8} {'peak MiB':>9}")
    print(
        f"{result.layers:6d} {result.ranks:5d} {result.steps:5d} {result.counts['tables']:6d} "
        f"{result.counts['points']:6d} "
        + " ".join(f"{result.seconds.get(part, 0.0):12.2f}" for part in PARTS)
        + f" {result.total_s:8.2f} {max(result.peak_mib.values()):9.0f}  {result.case}: {'; '.join(result.notes)}",
        flush=True,
    )


def _plan(case: str, layers: int, ranks: int, steps: int) -> Result:
    result = Result(case, layers, ranks, steps)
    if case == SDXL:
        graph, signature = result.part("capture", _sdxl)
        speeds = [1 - k / (2 * ranks) for k in range(ranks)]
    else:
        graph, signature = unet_like(layers), CallSignature(leaves=())
        speeds = [1.0 if k % 2 == 0 else 0.75 for k in range(ranks)]
    result.layers = len(graph.layers)
    costs = [(layer.flops + 1.0) / _FLOPS_PER_S for layer in graph.layers]
    link = Link(source=0, target=1, latency_s=1e-5, bytes_per_s=5e10)
    workers = [Worker(speed=speed, link=link) for speed in speeds]
    partitions = result.part(
        "partitions", lambda: candidate_partitions(graph, costs, (2, ranks), link=link, workers=workers)
    )
    for overlap in (False, True):
        division = result.part("divide", lambda overlap=overlap: divide(
            graph, costs, workers, overlap=overlap, any_order=len(set(speeds)) * len(graph.layers) < 2000
        ))
    patterns = result.part("patterns", lambda: measured_patterns(partitions, (1, 2, ranks)))
    profile = _profile(graph, signature, costs, partitions, patterns, steps)
    specs = [RankSpec(device="cuda", speed=speed) for speed in speeds]
    problem = result.part("step costs", lambda: _priced(profile, ranks, specs))
    frontier = result.part("frontier", lambda: solve_problem(problem))
    result.counts = {
        "partitions": len(partitions), "tables": len(problem.tables), "points": len(frontier),
        "states": frontier.states, "recomputed": sum(map(len, division.partition.recomputed)),
    }
    result.notes = ["errors synthetic", f"{len(partitions)} partitions"]
    if frontier.supported_only:
        result.notes.append("supported points only")
    if frontier.simplified:
        result.notes.append("ages simplified")
    return result


def _priced(profile: Profile, ranks: int, specs: Sequence[RankSpec]) -> Problem:
    problem = Problem(profile, ranks, ranks=specs)
    assert problem.tables
    return problem


def _sdxl() -> tuple[LayerGraph, CallSignature]:
    """SDXL's U-Net at 1024 pixels in half precision, captured without weights."""
    import torch
    from diffusers import UNet2DConditionModel

    from hybridiff_compiler.capture import capture, meta_denoiser
    from hybridiff_compiler.quality.architectures import SDXL_UNET

    half = {"dtype": torch.float16, "device": "meta"}
    captured = capture(meta_denoiser(UNet2DConditionModel, SDXL_UNET), (), {
        "sample": torch.zeros(1, 4, 128, 128, **half), "timestep": torch.zeros((), device="meta"),
        "encoder_hidden_states": torch.zeros(1, 77, 2048, **half), "return_dict": False,
        "added_cond_kwargs": {
            "text_embeds": torch.zeros(1, 1280, **half), "time_ids": torch.zeros(1, 6, **half),
        },
    })
    return captured.layers, captured.signature


def unet_like(size: int) -> LayerGraph:
    """A time embedding that all layers read, and a way down and up with skips; bytes halve at every fourth of it."""
    middle = size // 2
    level = [min(i, size - 1 - i) * 4 // max(1, middle) for i in range(size)]
    nbytes = [1 << (20 - depth) for depth in level]
    edges = [(0, tuple(range(1, size)), 4096)]
    edges += [(i, (i + 1,), nbytes[i]) for i in range(1, size - 1)]
    edges += [(i, (size - i,), nbytes[i]) for i in range(2, middle) if size - i > i + 1]
    rng = np.random.default_rng(0)
    return LayerGraph(
        layers=tuple(
            Layer(name=f"l{i}", parameter_bytes=1 << 22, flops=float(rng.uniform(1, 3)) * 1e10 if i else 1e6)
            for i in range(size)
        ),
        values=tuple(
            Value(
                name=f"v{k}", producer=f"l{p}", consumers=tuple(f"l{c}" for c in cs), shape=(b,), dtype="int8", nbytes=b
            )
            for k, (p, cs, b) in enumerate(edges)
        ),
        output=f"l{size - 1}",
    )


def _profile(
    graph: LayerGraph, signature: CallSignature, costs: Sequence[float], partitions: tuple[Partition, ...],
    patterns: tuple[Pattern, ...], steps: int,
) -> Profile:
    """A profile with these layer times and made-up errors: more stale reads and a missing branch make larger ones."""
    rng = np.random.default_rng(0)
    step, age = np.arange(steps)[:, None], np.arange(1, MAX_AGE + 1)[None, :]
    errors = []
    for pattern in patterns:
        if pattern.is_exact:
            continue
        level = 2e-3 if pattern.combine is Combine.MIRROR else 4e-4 * (1 + len(pattern.units) / 8)
        sources = []
        if any(read.stale for unit in pattern.units for read in unit.reads):
            sources.append("activations")
        if pattern.combine in (Combine.DELTA, Combine.LAST):
            sources.append("memory")
        curves = []
        for source in sources or ["none"]:
            rmse = level * 4 ** (0.5 - step / steps) * (0.3 + 0.7 * age) * np.exp(rng.normal(0, 0.05, (steps, MAX_AGE)))
            rows = tuple(map(tuple, (rmse if source != "none" else rmse[:, :1]).tolist()))
            for gap in GAPS if pattern.trend else (None,):
                oldest = MAX_AGE if gap is None else min(gap, LONGEST_TREND)
                curves.append(ErrorCurve(source=source, gap=gap, rmse=tuple(row[:oldest] for row in rows)))
        errors.append(PatternErrors(pattern=pattern.name, curves=tuple(curves)))
    model = ModelInfo(
        name="bench", denoiser="none", fingerprint=graph.fingerprint(), parameter_bytes=0, dtype="float16",
        signature=signature if signature.leaves else CallSignature(leaves=(
            LeafSpec(path="sample", shape=(1, 4, 128, 128), dtype="float16"),
        )),
    )
    pairs = ((0, 1), (1, 0))
    return Profile(
        model=model, graph=graph, num_steps=steps, scheduler="none", guidance_scale=5.0, partitions=partitions,
        patterns=patterns, errors=tuple(errors), compounding=Compounding(),
        costs=Costs(
            layers={1: tuple(costs), 2: tuple(1.9 * cost for cost in costs)}, step_overhead_s=1e-4,
            links=tuple(Link(source=a, target=b, latency_s=1e-5, bytes_per_s=5e10) for a, b in pairs),
        ),
        provenance=Provenance(
            created="", device="none", backend="none", versions={}, seed=0, prompts=0, prompts_sha256="",
            random_weights=True,
        ),
    )


if __name__ == "__main__":
    typer.run(main)
