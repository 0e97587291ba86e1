"""Recognising generations, steps and guidance from the calls alone."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from hybridiff_compiler.ir import InputError
from hybridiff_compiler.runtime.intercept import find_denoiser, intercept


class Log:
    """Counts what it is asked and answers with the latents."""

    def __init__(self, covered=True):
        self.starts, self.steps, self.covered = [], [], covered

    def start(self, num_steps, signature):
        self.starts.append((num_steps, signature))
        return self.covered

    def step(self, call):
        self.steps.append((call.step, call.num_steps))
        latents = {b: next(iter(call.inputs[b].values())) for b in call.inputs}
        assert torch.equal(latents["uncond"], latents["cond"])
        return latents


def test_every_step_of_every_generation_is_seen_in_order(bench):
    log = Log()
    with intercept(bench.pipe, log):
        bench.image(steps=4)
        bench.image(steps=5)
    assert [n for n, _ in log.starts] == [4, 5]
    assert log.steps == [(i, 4) for i in range(4)] + [(i, 5) for i in range(5)]


def test_everything_is_restored(bench):
    before = bench.image(steps=3)
    forward = bench.denoiser.forward
    with intercept(bench.pipe, Log()):
        assert bench.denoiser.forward != forward
        bench.image(steps=3)
    assert bench.denoiser.forward == forward
    assert "set_timesteps" not in vars(bench.pipe.scheduler)
    assert torch.equal(bench.image(steps=3), before)


def test_unguided_and_uncovered_generations_use_the_original_forward(bench):
    log = Log(covered=False)
    with intercept(bench.pipe, log):
        covered = bench.image(steps=3)
    assert log.steps == []
    assert torch.equal(covered, bench.image(steps=3))
    log = Log()
    generator = torch.Generator().manual_seed(0)
    with intercept(bench.pipe, log):
        bench.pipe("a cat", num_inference_steps=3, guidance_scale=1.0, generator=generator)
    assert log.starts == []


def test_two_images_without_guidance_are_not_taken_for_guidance(bench):
    log = Log()
    with intercept(bench.pipe, log):
        bench.pipe(["a cat", "a dog"], num_inference_steps=2, guidance_scale=1.0)
    assert log.starts == []


def test_a_replaced_scheduler_is_followed():
    from hybridiff_compiler import reference_models

    pipe = reference_models.load("unet")
    log = Log()
    with intercept(pipe, log):
        pipe("a cat", num_inference_steps=3)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe("a cat", num_inference_steps=4)
    assert [n for n, _ in log.starts] == [3, 4]
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_an_interrupted_generation_does_not_shift_the_next(bench):
    log = Log()

    def stop(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    with intercept(bench.pipe, log):
        with pytest.raises(KeyboardInterrupt):
            bench.image(steps=5, callback_on_step_end=stop)
        bench.image(steps=3)
    assert log.steps == [(0, 5)] + [(i, 3) for i in range(3)]


def test_denoiser_is_found_by_its_forward(bench):
    assert find_denoiser(bench.pipe) == (bench.attribute, bench.denoiser)

    class NoDenoiser:
        components = {"vae": bench.pipe.vae}  # noqa: RUF012

    with pytest.raises(InputError, match="0 components"):
        find_denoiser(NoDenoiser())
