"""Schedulers as linear maps, found by running them once.

Deterministic samplers (DDIM, DPM-Solver, Euler, flow matching, multistep or not) turn the starting latents and the
guided estimates into the final latents by a linear map. Its coefficients are read off by running the *user's own
scheduler object* on latents that hold one number per unknown: element j receives a unit estimate at step j and nothing
else, one more element starts at one. No scheduler is known by name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir import InputError

__all__ = ["SamplerMap", "sampler_map"]


@dataclass(frozen=True)
class SamplerMap:
    """Coefficients of a sampler of N steps: `to_input[i, j]` is d(denoiser input of step i) / d(estimate of step j),
    `to_final[j]` is d(final latents) / d(estimate of step j); `start_*` are the same for the starting latents."""

    to_input: Tensor
    """[N, N], zero for j >= i."""
    to_final: Tensor
    """[N]."""
    start_to_input: Tensor
    """[N]."""
    start_to_final: Tensor
    """0-d."""

    def check(self, start: Tensor, estimates: list[Tensor], final: Tensor, tolerance: float = 5e-3) -> None:
        """Raise InputError unless the map reproduces a recorded generation to `tolerance` (relative RMS)."""
        predicted = self.start_to_final.to(start) * start
        for weight, estimate in zip(self.to_final.tolist(), estimates):
            predicted = predicted + weight * estimate
        error = float((predicted - final).float().pow(2).mean().sqrt() / final.float().pow(2).mean().sqrt())
        if not error < tolerance:
            raise InputError(
                f"the scheduler is not a linear map of the denoiser's estimates (it reproduces a generation only to "
                f"{error:.1%}); switch off clipping, thresholding and added noise (clip_sample, thresholding, eta), or "
                "profile with a deterministic scheduler"
            )


def sampler_map(scheduler: Any, num_steps: int, *, seed: int = 0) -> SamplerMap:
    """The linear map of `scheduler` over its last `num_steps` timesteps.

    Args:
        scheduler: a scheduler whose `set_timesteps` has been called; it is copied, never changed.
        num_steps: how many of its timesteps are run (fewer than all for image-to-image).
        seed: for stochastic schedulers.
    """
    rows_unit, final_unit = _run(scheduler, num_steps, seed, unit=1.0)
    rows_zero, final_zero = _run(scheduler, num_steps, seed, unit=0.0)
    rows, final = rows_unit - rows_zero, final_unit - final_zero
    return SamplerMap(
        to_input=rows[:, :num_steps], to_final=final[:num_steps], start_to_input=rows[:, num_steps],
        start_to_final=final[num_steps],
    )


def _run(scheduler: Any, num_steps: int, seed: int, unit: float) -> tuple[Tensor, Tensor]:
    sampler = copy.deepcopy(scheduler)
    timesteps = sampler.timesteps[-num_steps:]
    device = timesteps.device
    latents = torch.zeros(1, 1, 1, num_steps + 1, device=device)
    latents[..., num_steps] = unit
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rows = []
    for step, timestep in enumerate(timesteps):
        scale = getattr(sampler, "scale_model_input", None)
        rows.append((latents if scale is None else scale(latents, timestep)).reshape(-1).clone())
        estimate = torch.zeros_like(latents)
        estimate[..., step] = unit
        latents = _step(sampler, estimate, timestep, latents, generator)
    return torch.stack(rows).double().cpu(), latents.reshape(-1).double().cpu()


def _step(sampler: Any, estimate: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
    try:
        return sampler.step(estimate, timestep, latents, generator=generator, return_dict=False)[0]
    except TypeError:  # samplers without randomness take no generator
        return sampler.step(estimate, timestep, latents, return_dict=False)[0]
