"""From errors of single steps to errors of the final image, by linear propagation.

An error delta_i of the guided estimate at step i moves the final image by J_i delta_i. Finishing the generation for
every (step, pattern, age) would cost O(steps^2); instead K random images n_k are pulled back through the decoder and
the whole generation once, which yields the products mu_ik = J_i^T n_k for all steps. Then E_k (mu_ik . delta)^2 =
|J_i delta|^2 (Hutchinson's estimator), so any number of errors at any step costs a dot product each. The cost is
O(steps) backward passes per probe, and the sampler enters through its exact linear coefficients (`linear.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.special import digamma
from torch import Tensor

from ..ir import BRANCHES, Pattern
from ..runtime.segments import SegmentRunner
from ..runtime.simulator import run_pattern
from .generate import require_finite
from .linear import SamplerMap
from .record import Option, Recording, guided

__all__ = ["Sketches", "image_error", "propagate", "pull_back_images", "standard_error_db"]


@dataclass(frozen=True)
class Sketches:
    """Projections of final-image errors on K random images: per step, option -> [K, P] (P images)."""

    steps: list[dict[Option, Tensor]]
    pixels: int
    """Numbers in one image."""


def pull_back_images(
    decode: Callable[[Tensor], Tensor], final: Tensor, probes: int, seed: int
) -> tuple[Tensor, int]:
    """K random image directions as latents: `v_k = (d decode / d latents)^T n_k`, [K, P, ...]; and the image's size.

    Raises:
        InputError: an image is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = final.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        images = require_finite(decode(latents), "the images")
        rows = []
        for _ in range(probes):
            noise = torch.randn(images.shape, generator=generator).to(images)
            rows.append(torch.autograd.grad(images, latents, noise, retain_graph=True)[0])
    return torch.stack(rows), images[0].numel()


def propagate(
    recording: Recording,
    runner: SegmentRunner,
    exact: Pattern,
    sampler: SamplerMap,
    latents_path: str,
    probes: Tensor,
    pixels: int,
    guidance_scale: float,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> Sketches:
    """Walk the recorded generation backwards and project every deviation on the probes.

    Args:
        recording: exact generations of P images with the deviations to judge.
        runner, exact: evaluates both branches.
        sampler: the scheduler's linear map.
        latents_path: the leaf of the denoiser's call that holds the latents.
        probes: [K, P, ...] directions in final-latent space.
        pixels: numbers in one image.
        guidance_scale: g.
        on_step: progress callback (steps done, number of steps).
    """
    steps = len(recording.pairs)
    pulled: list[Tensor] = [torch.empty(0)] * steps
    sketches: list[dict[Option, Tensor]] = [{} for _ in range(steps)]
    for step in reversed(range(steps)):
        direction = float(sampler.to_final[step]) * probes
        for later in range(step + 1, steps):
            weight = float(sampler.to_input[later, step])
            if weight:
                direction = direction + weight * pulled[later]
        sketches[step] = {
            option: (direction * deviation).flatten(2).sum(dim=2).double().cpu()
            for option, deviation in recording.deviations[step].items()
        }
        if step:  # nothing precedes step 0, so its input gradient is not needed
            pulled[step] = _pull_back(recording, runner, exact, step, latents_path, direction, guidance_scale)
        on_step(steps - step, steps)
    return Sketches(sketches, pixels)


def _pull_back(
    recording: Recording, runner: SegmentRunner, exact: Pattern, step: int, path: str, direction: Tensor, scale: float
) -> Tensor:
    """`(d guided estimate / d denoiser input)^T direction` for each probe, [K, P, ...]."""
    recorded = recording.inputs[step]
    latents = recorded["uncond"][path].detach().clone().requires_grad_(True)
    inputs = {branch: {**recorded[branch], path: latents} for branch in BRANCHES}
    with torch.enable_grad():
        pair, _ = run_pattern(runner, exact, inputs, {})
        estimate = guided(pair, scale)
        last = direction.shape[0] - 1
        rows = [
            torch.autograd.grad(estimate, latents, direction[k].to(estimate), retain_graph=k < last)[0]
            for k in range(direction.shape[0])
        ]
    return torch.stack(rows)


def image_error(sketches: Sequence[Tensor], pixels: int) -> float:
    """Geometric mean over images of the final image's RMS error, from projections ([K, P] each, P may differ)."""
    return math.exp(0.5 * float(_log_powers(sketches, pixels).mean()))


def standard_error_db(sketches: Sequence[Tensor]) -> float:
    """Standard error of `20 log10(image_error)`, from the spread over images; 0 for a single image."""
    logs = _log_powers(sketches, 1)
    return float(logs.std() / math.sqrt(len(logs))) * 10 / math.log(10) if len(logs) > 1 else 0.0


def _log_powers(sketches: Sequence[Tensor], pixels: int) -> Tensor:
    """Per image, the logarithm of the mean square error.

    The mean of the logarithm of a K-probe estimate is biased by `digamma(K/2) - log(K/2)`, which is taken out.
    """
    logs = []
    for sketch in sketches:
        probes = sketch.shape[0]
        power = sketch.pow(2).mean(dim=0).clamp_min(1e-24) / pixels
        logs.append(power.log() - (float(digamma(probes / 2)) - math.log(probes / 2)))
    return torch.cat(logs)
