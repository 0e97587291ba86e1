"""What a plan gains and costs on this machine, against the unmodified pipeline on one rank."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..bundle import Bundle, resolve_plan
from ..ir import Data, Plan, UsageError
from ..profiler.generate import Generation
from ..profiler.timing import pinned_threads
from ..runtime.parallelize import parallelize
from .coverage import check_covered
from .measure import QualityError, Sample, generate, max_abs_diff, simulate, split_batch_plan
from .metrics import mean_psnr, psnr, ssim

__all__ = ["PromptQuality", "Verification", "check_verification", "verify"]

Progress = Callable[[str, int, int], None]


class PromptQuality(Data):
    """One prompt's image against the exact one-rank image of the same seed."""

    prompt: str
    psnr_db: float | None
    """Null where the images are equal, or the plan is exact."""
    ssim: float
    max_abs_diff: float


class Verification(Data):
    """Quality and speed of a plan; times are medians over generations of one image."""

    schema_version: Literal[1] = 1
    model: str
    plan_sha256: str
    schedule: str
    ranks: int
    threads: int | None
    """CPU threads per rank, on both sides of the comparison."""
    simulated: bool
    """Images come from the single-device simulator; the plan's times are null."""
    prompts: tuple[PromptQuality, ...]
    psnr_db: float | None
    psnr_db_min: float | None
    predicted_psnr_db: float | None
    psnr_quantile_db: float | None = None
    """Of plans for a quantile over prompts: that quantile, measured."""
    predicted_psnr_quantile_db: float | None = None
    ssim: float
    max_abs_diff: float
    simulator_max_abs_diff: float | None
    """Distributed images against simulated ones: 0 on CPU ranks. Null when simulated."""
    split_batch_max_abs_diff: float | None
    """Exact plans: against one process that evaluates the two branches one by one; 0 for `branch`. Null for bundles."""
    latency_s: float | None
    """Denoising loop (see `measure`)."""
    call_s: float | None
    """Whole pipeline call."""
    single_latency_s: float
    single_call_s: float
    speedup: float | None
    """`single_latency_s / latency_s`."""
    predicted_speedup: float | None
    ideal_speedup: float | None


def verify(
    pipe: Any,
    plan: Plan | Bundle | str | os.PathLike[str],
    *,
    prompts: Sequence[str],
    num_inference_steps: int | None = None,
    guidance_scale: float = 5.0,
    seed: int = 0,
    simulated: bool = False,
    threads: int | None = 1,
    repeats: int = 3,
    timeout_s: float = 60.0,
    on_progress: Progress | None = None,
    **options: Any,
) -> Verification:
    """Generate `prompts` exactly on one rank and by `plan`, and compare.

    Args:
        pipe: the pipeline, on the first rank's device.
        plan: what to verify: a plan, its file, or a bundle or its folder.
        prompts: prompt k starts from `seed + k`; each is generated alone.
        num_inference_steps: default: the plan's, and no other number is covered.
        guidance_scale: of both sides.
        seed: see `prompts`.
        simulated: take the plan's images from the simulator instead of its ranks (no times then).
        threads: CPU threads per rank; None leaves torch as it is.
        repeats: least number of timed generations per side.
        timeout_s: see `parallelize`.
        on_progress: called with (stage, done, total).
        **options: further keyword arguments of the pipeline call.

    Raises:
        UsageError: no prompts.
        PlanMismatchError: the plan is for another model, resolution or number of steps.
        WorkerError: a rank failed.
    """
    if not prompts:
        raise UsageError("got no prompts; give at least one")
    plan, backend = resolve_plan(plan)
    generation = Generation(
        pipe=pipe, num_inference_steps=num_inference_steps or plan.num_steps, guidance_scale=guidance_scale, seed=seed,
        options=options,
    )
    check_covered(generation, plan, prompts[0])
    report = on_progress or (lambda stage, done, total: None)
    on_cpu = plan.ranks[0].device == "cpu"
    with pinned_threads(threads if on_cpu else None):
        exact = _timed(generation, prompts, repeats, lambda done, total: report("one rank, exact", done, total))
        reference = _images(exact, len(prompts))
        images, timed = None, None
        if not simulated:
            with parallelize(
                pipe, plan, threads=threads if on_cpu else None, timeout_s=timeout_s, backend=backend
            ):
                timed = _timed(
                    generation, prompts, repeats, lambda done, total: report(f"{plan.world_size} ranks", done, total)
                )
            images = _images(timed, len(prompts))
        report("simulator", 0, len(prompts))
        replayed, _ = simulate(generation, plan, prompts, batch=1, backend=backend or "eager")
        # Compiled graphs sum in another order than the pipeline does: nothing is exactly equal then.
        split = None
        if plan.is_exact and backend is None:
            split, _ = simulate(generation, split_batch_plan(plan), prompts, batch=1)
        report("simulator", len(prompts), len(prompts))
    final = replayed if images is None else images
    return _verification(
        plan, prompts, final, reference, exact, timed, threads=threads if on_cpu else None,
        simulator_max_abs_diff=None if images is None else max_abs_diff(images, replayed),
        split_batch_max_abs_diff=None if split is None else max_abs_diff(final, split),
    )


def check_verification(report: Verification, *, min_psnr: float | None = None) -> None:
    """Refuse a result that breaks what the plan claims, or is worse than `min_psnr`.

    Raises:
        QualityError: saying what was measured and what was asked for.
    """
    if report.simulator_max_abs_diff:
        raise QualityError(
            f"the {report.ranks} ranks returned other images than the simulator (largest difference "
            f"{report.simulator_max_abs_diff:.1e}, expected 0); report this with the plan"
        )
    if min_psnr is not None and report.psnr_db is not None and report.psnr_db < min_psnr:
        raise QualityError(
            f"mean PSNR is {report.psnr_db:.2f} dB over {len(report.prompts)} prompts, below the {min_psnr:g} dB asked "
            "for; plan again with a higher --min-psnr"
        )


def _timed(
    generation: Generation, prompts: Sequence[str], repeats: int, on_done: Callable[[int, int], None]
) -> list[Sample]:
    """One sample per prompt, and more of the first ones until there are `repeats`; a warm-up goes before."""
    generate(generation, prompts[:1])
    count = max(repeats, len(prompts))
    samples = []
    for index in range(count):
        k = index % len(prompts)
        samples.append(generate(generation, prompts[k : k + 1], first=k))
        on_done(index + 1, count)
    return samples


def _images(samples: Sequence[Sample], count: int) -> Tensor:
    return torch.cat([sample.images for sample in samples[:count]])


def _quantile(decibels: Sequence[float], quantile: float | None) -> float | None:
    """That quantile of the PSNR over prompts (at most 100 each), between its neighbours."""
    if quantile is None:
        return None
    known = torch.tensor(decibels, dtype=torch.float64).clamp(max=100.0)
    return float(known.quantile(quantile))


def _verification(
    plan: Plan, prompts: Sequence[str], images: Tensor, reference: Tensor, exact: Sequence[Sample],
    timed: Sequence[Sample] | None, **known: Any,
) -> Verification:
    decibels, similarity = psnr(images, reference), ssim(images, reference)
    judged = None if plan.is_exact else mean_psnr(images, reference)
    single_s = statistics.median(sample.loop_s for sample in exact)
    latency_s = None if timed is None else statistics.median(sample.loop_s for sample in timed)
    return Verification(
        model=plan.model.name, plan_sha256=plan.digest(), schedule=str(plan.schedule), ranks=plan.world_size,
        simulated=timed is None,
        prompts=tuple(
            PromptQuality(
                prompt=prompt, psnr_db=None if plan.is_exact or math.isinf(decibels[k]) else decibels[k],
                ssim=similarity[k], max_abs_diff=max_abs_diff(images[k], reference[k]),
            )
            for k, prompt in enumerate(prompts)
        ),
        psnr_db=judged,
        psnr_db_min=None if judged is None else min(*decibels, 100.0),
        predicted_psnr_db=plan.predictions.psnr_db,
        psnr_quantile_db=None if judged is None else _quantile(decibels, plan.predictions.quantile),
        predicted_psnr_quantile_db=plan.predictions.psnr_quantile_db,
        ssim=sum(similarity) / len(similarity),
        max_abs_diff=max_abs_diff(images, reference),
        latency_s=latency_s,
        call_s=None if timed is None else statistics.median(sample.call_s for sample in timed),
        single_latency_s=single_s,
        single_call_s=statistics.median(sample.call_s for sample in exact),
        speedup=None if latency_s is None else single_s / latency_s,
        predicted_speedup=plan.predictions.speedup,
        ideal_speedup=plan.predictions.ideal_speedup,
        **known,
    )
