"""A profile of a bundled model with a real graph and made-up numbers: seconds to build instead of minutes."""

from functools import cache

from hybridiff_compiler import reference_models
from hybridiff_compiler.ir import (
    Combine,
    Costs,
    ErrorCurve,
    Guidance,
    ModelInfo,
    PatternErrors,
    Profile,
    Provenance,
)
from hybridiff_compiler.planner import candidate_partitions, generate_patterns
from hybridiff_compiler.profiler.generate import FirstCall, Generation
from hybridiff_compiler.runtime.branch_calls import capture_branch
from hybridiff_compiler.runtime.intercept import find_denoiser

AGES = 4
STEPS = 4


@cache
def bundled_unet():
    """The pipeline of `bundled:unet`, loaded once for all tests."""
    return reference_models.load("unet")


@cache
def unet_profile():
    """Its fabricated profile."""
    pipe = bundled_unet()
    return fabricated_profile(pipe, find_denoiser(pipe)[1], "unet", STEPS)


def fabricated_profile(pipe, denoiser, name, steps, **options):
    """A profile of `pipe` at `steps` steps; errors fall along the trajectory and grow with age."""
    first = FirstCall()
    Generation(pipe=pipe, num_inference_steps=3, guidance_scale=5.0, options=options).latents(["a cat"], first)
    signature, _ = first.require()
    graph = capture_branch(denoiser, signature).layers
    seconds = tuple(1e-3 for _ in graph.layers)
    partitions = candidate_partitions(graph, seconds)
    patterns = generate_patterns(partitions, 2)
    return Profile(
        model=ModelInfo(
            name=f"bundled:{name}", denoiser=type(denoiser).__name__, fingerprint=graph.fingerprint(),
            parameter_bytes=sum(p.numel() * p.element_size() for p in denoiser.parameters()), dtype="float32",
            signature=signature,
        ),
        graph=graph,
        costs=Costs(layers={1: seconds, 2: tuple(2 * s for s in seconds)}),
        num_steps=steps, scheduler=type(pipe.scheduler).__name__,
        guidance_scale=reference_models.DEFAULTS[name]["guidance_scale"],
        guidance=Guidance(rel_mae=((0.1,) * steps,)),
        partitions=partitions, patterns=patterns,
        errors=tuple(_errors(pattern, steps) for pattern in patterns if not pattern.is_exact),
        provenance=Provenance(
            created="2026-01-01T00:00:00+00:00", device="made up", backend="eager", threads=1, versions={}, seed=0,
            prompts=1, prompts_sha256="0" * 64, random_weights=True,
        ),
    )


def _errors(pattern, steps):
    rows = tuple(tuple(1e-3 * age / (step + 1) for age in range(1, AGES + 1)) for step in range(steps))
    sources = []
    if any(read.stale for unit in pattern.units for read in unit.reads):
        sources.append("activations")
    if pattern.combine in (Combine.DELTA, Combine.LAST):
        sources.append("memory")
    gaps = (1, 2) if pattern.trend else (None,)
    return PatternErrors(
        pattern=pattern.name, curves=tuple(ErrorCurve(source=s, gap=gap, rmse=rows) for s in sources for gap in gaps)
    )
