"""The linear map of a sampler against running the sampler."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from hybridiff_compiler.ir import InputError
from hybridiff_compiler.profiler.linear import sampler_map

SAMPLERS = [
    (DDIMScheduler, {"clip_sample": False}),
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    (DPMSolverMultistepScheduler, {}),
    (EulerDiscreteScheduler, {}),
    (UniPCMultistepScheduler, {}),
    (HeunDiscreteScheduler, {}),
]


def run(scheduler, start, estimates):
    latents, inputs = start, []
    for estimate, timestep in zip(estimates, scheduler.timesteps):
        inputs.append(scheduler.scale_model_input(latents, timestep)
                      if hasattr(scheduler, "scale_model_input") else latents)
        latents = scheduler.step(estimate, timestep, latents, return_dict=False)[0]
    return inputs, latents


@pytest.mark.parametrize(("sampler", "options"), SAMPLERS, ids=lambda value: getattr(value, "__name__", ""))
def test_map_reproduces_inputs_and_final_latents(sampler, options):
    scheduler = sampler(**options)
    scheduler.set_timesteps(12)
    steps = len(scheduler.timesteps)
    found = sampler_map(scheduler, steps)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 4, 8, 8, generator=generator)
    estimates = [torch.randn(1, 4, 8, 8, generator=generator) for _ in range(steps)]
    inputs, final = run(scheduler, start, estimates)
    found.check(start, estimates, final)
    for step in (0, 1, steps // 2, steps - 1):
        predicted = float(found.start_to_input[step]) * start
        for j in range(step):
            predicted = predicted + float(found.to_input[step, j]) * estimates[j]
        torch.testing.assert_close(predicted, inputs[step], rtol=1e-3, atol=1e-3)
    assert not torch.triu(found.to_input).any()


def test_clipping_is_noticed():
    scheduler = DDIMScheduler(clip_sample=True, clip_sample_range=0.1)
    scheduler.set_timesteps(6)
    start = torch.randn(1, 4, 8, 8)
    estimates = [torch.randn(1, 4, 8, 8) for _ in range(6)]
    found = sampler_map(scheduler, 6)
    _, final = run(scheduler, start, estimates)
    with pytest.raises(InputError, match="clip_sample"):
        found.check(start, estimates, final)


def test_the_scheduler_itself_is_untouched():
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(5)
    sampler_map(scheduler, 5)
    assert scheduler.step_index is None
