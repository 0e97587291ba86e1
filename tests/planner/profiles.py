"""Synthetic profiles with the proportions that real ones have; no measurement behind them."""

from __future__ import annotations

import numpy as np

from hybridiff_compiler.ir import (
    CallSignature,
    Combine,
    Compounding,
    Costs,
    ErrorCurve,
    Guidance,
    LeafSpec,
    Link,
    ModelInfo,
    PatternErrors,
    Profile,
    Provenance,
    StageCost,
)
from hybridiff_compiler.planner import candidate_partitions, family_of, generate_patterns

from .graphs import unet_like

# Error of one step in the middle of a generation at age 1, after shared/FACTS-like 10-step windows of a U-Net.
_LEVEL = {
    "paper": 4.0e-3, "cond-pipe-unguided": 3.2e-3, "cond-pipe": 0.5e-3, "branch-reuse": 0.8e-3, "reuse": 2.0e-3,
    "half-trend": 1.6e-3, "trend": 1.5e-3,
}
_MEMORY_LEVEL = 1.2e-3


def make_profile(
    *, num_steps: int = 50, depth: int = 10, max_age: int = 8, noise: float = 0.05, seed: int = 0,
    scheduler: str = "DDIMScheduler", links: bool = False, **changes: object,
) -> Profile:
    """A profile of a U-Net shaped denoiser.

    Errors fall along the trajectory and grow about linearly with age; branches batched together cost 1.9 of one.
    """
    rng = np.random.default_rng(seed)
    graph = unet_like(depth)
    layers = rng.uniform(0.5, 1.5, len(graph.layers))
    layers *= 0.020 / layers.sum()
    partitions = candidate_partitions(graph, layers.tolist())
    patterns = generate_patterns(partitions, 2)

    def curve(level: float, source: str, gap: int | None = None) -> ErrorCurve:
        step, age = np.arange(num_steps)[:, None], np.arange(1, max_age + 1)[None, :]
        rmse = level * 4 ** (0.5 - step / num_steps) * (0.3 + 0.7 * age)
        rmse = rmse * np.exp(rng.normal(0.0, noise, rmse.shape))
        return ErrorCurve(source=source, gap=gap, rmse=tuple(map(tuple, rmse.tolist())))  # type: ignore[arg-type]

    errors = []
    for pattern in patterns:
        if pattern.is_exact:
            continue
        level = _LEVEL[family_of(pattern.name)] * (0.6 if pattern.partition == "nested" else 1.0)
        curves = [] if pattern.combine is Combine.LAST else [curve(level, "activations")]
        if pattern.trend:
            curves = [curve(level * (0.8 + 0.2 * gap), "memory", gap) for gap in (1, 2, 4)]
        elif pattern.combine in (Combine.LAST, Combine.DELTA):
            curves.append(curve(level if pattern.combine is Combine.LAST else _MEMORY_LEVEL, "memory"))
        errors.append(PatternErrors(pattern=pattern.name, curves=tuple(curves)))

    stages = []
    whole = float(layers.sum())
    stages.append(StageCost(partition="whole", stages=(0,), batch=1, seconds=whole))
    stages.append(StageCost(partition="whole", stages=(0,), batch=2, seconds=1.9 * whole))
    seconds = dict(zip(graph.names, layers.tolist()))
    for partition in partitions:
        for index, names in enumerate(partition.stages):
            measured = sum(seconds[name] for name in names) * rng.uniform(1.0, 1.04)
            stages.append(StageCost(partition=partition.name, stages=(index,), batch=1, seconds=measured))
    signature = CallSignature(leaves=(
        LeafSpec(path="encoder_hidden_states", shape=(1, 16, 128), dtype="float16"),
        LeafSpec(path="sample", shape=(1, 4, 16, 16), dtype="float16"),
        LeafSpec(path="timestep", shape=(), dtype="int64"),
    ))
    fields: dict[str, object] = {
        "model": ModelInfo(
            name="synthetic", denoiser="UNet", fingerprint=graph.fingerprint(), parameter_bytes=1, dtype="float16",
            signature=signature,
        ),
        "graph": graph,
        "costs": Costs(
            layers={1: tuple(layers.tolist()), 2: tuple((1.9 * layers).tolist())}, stages=tuple(stages),
            step_overhead_s=0.001,
            links=tuple(
                Link(source=a, target=1 - a, latency_s=1e-4, bytes_per_s=1e9) for a in (0, 1)
            ) if links else (),
        ),
        "num_steps": num_steps,
        "scheduler": scheduler,
        "guidance_scale": 5.0,
        "guidance": Guidance(rel_mae=(tuple(np.linspace(0.3, 0.1, num_steps).tolist()),) * 2),
        "partitions": partitions,
        "patterns": patterns,
        "errors": tuple(errors),
        "compounding": Compounding(residual_db=0.5, schedules=8),
        "provenance": Provenance(
            created="2026-01-01T00:00:00+00:00", device="synthetic", backend="none", versions={}, seed=0, prompts=2,
            prompts_sha256="0" * 64,
        ),
    }
    return Profile.model_validate(fields | changes)
