"""Unmodified diffusers pipelines on two ranks: the bundled models, against the simulator and plain diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridiff_compiler import reference_models
from hybridiff_compiler.runtime.intercept import find_denoiser, intercept
from hybridiff_compiler.runtime.parallelize import parallelize
from hybridiff_compiler.runtime.segments import SegmentRunner
from hybridiff_compiler.runtime.simulator import Simulator

from .tiny import SignatureRecorder, adaptive, make_plan

TABLES = (
    ("branch", "u0@0 c0@1 | cfg", "whole"),
    ("reuse", "- | last", "whole"),
    ("paper", "u0@0(c1~) c1@1(u0~) | mirror", "nested"),
    ("cond-pipe", "c0@0(c1~) c1@1(c0~) | delta", "nested"),
    ("branch-reuse", "u1@0(u0~) c1@1(c0~) | cfg", "nested"),
    ("pipe", "u0@0(u1~) c0@0(c1~) u1@1(u0~) c1@1(c0~) | cfg", "linear"),
)
STEPS = ("branch", "paper", "cond-pipe", "reuse", "branch-reuse", "pipe", "branch", "branch")


def generate(name: str, pipe: Any, prompt: str, steps: int = len(STEPS), **kwargs: Any) -> torch.Tensor:
    arguments = reference_models.DEFAULTS[name] | {"num_inference_steps": steps} | kwargs
    generator = torch.Generator().manual_seed(1)
    return pipe(prompt, generator=generator, output_type="latent", **arguments).images


@pytest.mark.parametrize("name", reference_models.NAMES)
def test_bundled_model_on_two_ranks(name: str) -> None:
    pipe = reference_models.load(name)
    _, denoiser = find_denoiser(pipe)
    recorder = SignatureRecorder()
    with intercept(pipe, recorder):
        plain = generate(name, pipe, "a red apple")
    plan = make_plan(denoiser, recorder.signature, STEPS, tables=TABLES)
    exact, online = plan.with_steps(("branch",) * len(STEPS)), adaptive(plan)
    runners: dict[int, SegmentRunner] = {}

    def simulated(plan, prompt: str) -> torch.Tensor:
        with intercept(pipe, Simulator(plan, denoiser, runners=runners)):
            return generate(name, pipe, prompt)

    expected = {p: simulated(plan, p) for p in ("a red apple", "a smiling face with sunglasses and a hat")}
    expected_exact, expected_online = simulated(exact, "a red apple"), simulated(online, "a red apple")
    assert torch.allclose(expected_exact, plain, atol=1e-3)  # batch-size numerics
    with parallelize(pipe, plan, threads=1) as parallel:
        for prompt, image in expected.items():
            assert torch.equal(generate(name, pipe, prompt), image)
            assert parallel.executed == STEPS
        parallel.use(exact)
        assert torch.equal(generate(name, pipe, "a red apple"), expected_exact)
        parallel.use(online)
        assert torch.equal(generate(name, pipe, "a red apple"), expected_online)
        with pytest.warns(UserWarning, match="does not cover"):
            generate(name, pipe, "a red apple", height=96, width=96, steps=1)

        def interrupt(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
            pipeline._interrupt = step == 2
            return tensors

        parallel.use(plan)
        generate(name, pipe, "a red apple", callback_on_step_end=interrupt)
        assert len(parallel.executed) == 3
        assert torch.equal(generate(name, pipe, "a red apple"), expected["a red apple"])
    assert torch.equal(generate(name, pipe, "a red apple"), plain)
