"""Guidance by two calls per step: stock Flux, Qwen-Image and Wan pipelines with tiny random networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridiff_compiler.runtime.intercept import find_denoiser, intercept
from hybridiff_compiler.runtime.parallelize import parallelize
from hybridiff_compiler.runtime.simulator import Simulator

from .test_intercept import Log
from .tiny import SignatureRecorder, make_plan

TABLES = (
    ("branch", "u0@0 c0@1 | cfg", "whole"),
    ("reuse", "- | last", "whole"),
    ("cond-pipe", "c0@0(c1~) c1@1(c0~) | delta", "linear"),
    ("branch-reuse", "u1@0(u0~) c1@1(c0~) | cfg", "linear"),
)
STEPS = ("branch", "cond-pipe", "reuse", "branch-reuse", "branch", "branch")


class Flux:
    """`FluxPipeline` with true guidance, embeddings in place of prompts."""

    def __init__(self) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        ).eval()
        self.pipe = FluxPipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
            text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        )
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, seed: int = 0, steps: int = len(STEPS), guidance: float = 3.0, **options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        embeddings = {
            f"{kind}prompt_embeds": torch.randn(1, 7, 32, generator=generator) for kind in ("", "negative_")
        }
        pooled = {
            f"{kind}pooled_prompt_embeds": torch.randn(1, 16, generator=generator) for kind in ("", "negative_")
        }
        return self.pipe(**({
            **embeddings, **pooled, "height": 64, "width": 64, "num_inference_steps": steps,
            "true_cfg_scale": guidance, "generator": generator, "output_type": "latent",
        } | options))[0]


class Wan:
    """`WanPipeline`, embeddings in place of prompts."""

    def __init__(self) -> None:
        from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=32,
            ffn_dim=48, num_layers=3, rope_max_seq_len=32,
        ).eval()
        vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        self.pipe = WanPipeline(
            transformer=transformer, vae=vae, tokenizer=None, text_encoder=None,
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        )
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, seed: int = 0, steps: int = len(STEPS), guidance: float = 3.0, **options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        embeddings = {
            f"{kind}prompt_embeds": torch.randn(1, 7, 32, generator=generator) for kind in ("", "negative_")
        }
        return self.pipe(**({
            **embeddings, "height": 64, "width": 64, "num_frames": 5, "num_inference_steps": steps,
            "guidance_scale": guidance, "generator": generator, "output_type": "latent",
        } | options))[0]


class Qwen:
    """`QwenImagePipeline`, embeddings in place of prompts."""

    def __init__(self) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

        torch.manual_seed(0)
        transformer = QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        ).eval()
        self.pipe = QwenImagePipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
            tokenizer=None,
        )
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(
        self, seed: int = 0, steps: int = len(STEPS), guidance: float = 3.0, tokens: int = 7, **options: Any
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.pipe(**({
            "prompt_embeds": torch.randn(1, 7, 32, generator=generator),
            "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
            "negative_prompt_embeds": torch.randn(1, tokens, 32, generator=generator),
            "negative_prompt_embeds_mask": torch.ones(1, tokens, dtype=torch.long),
            "height": 64, "width": 64, "num_inference_steps": steps,
            "true_cfg_scale": guidance, "generator": generator, "output_type": "latent",
        } | options))[0]


@pytest.fixture(scope="module", params=[Flux, Qwen, Wan])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param()


def plan_for(model: Any, steps: tuple[str, ...] = STEPS) -> Any:
    recorder = SignatureRecorder()
    with intercept(model.pipe, recorder):
        model(steps=2)
    return make_plan(find_denoiser(model.pipe)[1], recorder.signature, steps, tables=TABLES)


def test_every_step_is_seen_once_and_both_branches_with_it(model: Any) -> None:
    log = Log()
    with intercept(model.pipe, log):
        model(steps=4)
        model(steps=5, seed=1)
    assert [count for count, _ in log.starts] == [4, 5]
    assert log.steps == [(i, 4) for i in range(4)] + [(i, 5) for i in range(5)]


def test_unguided_generations_run_as_they_are(model: Any) -> None:
    log = Log()
    with intercept(model.pipe, log):
        unguided = model(guidance=1.0)
    assert log.starts == []
    assert torch.equal(unguided, model(guidance=1.0))


def test_two_ranks_compute_what_the_simulator_computes(model: Any) -> None:
    plan, denoiser = plan_for(model), find_denoiser(model.pipe)[1]
    plain = model()
    exact = plan.with_steps(("branch",) * len(STEPS))
    with intercept(model.pipe, Simulator(plan, denoiser)):
        expected = model()
    assert not torch.allclose(expected, plain, atol=1e-3)
    with parallelize(model.pipe, plan, threads=1) as parallel:
        assert torch.equal(model(), expected)
        assert parallel.executed == STEPS
        parallel.use(exact)
        # Two calls are two calls of one image here and there: the same arithmetic.
        assert torch.equal(model(), plain)
        assert torch.equal(model(seed=3), plain_of(model, 3))
    assert torch.equal(model(), plain)


def plain_of(model: Any, seed: int) -> torch.Tensor:
    return type(model)()(seed=seed)


def test_a_negative_prompt_exchanged_under_way_is_followed(model: Any) -> None:
    plan = plan_for(model, ("branch",) * len(STEPS))
    other = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(9))

    def exchange(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"negative_prompt_embeds": other, "prompt_embeds": tensors["prompt_embeds"] + 1} if step == 2 else {}

    arguments = {"callback_on_step_end": exchange, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    plain = model(**arguments)
    simulator = Simulator(plan, find_denoiser(model.pipe)[1])
    with intercept(model.pipe, simulator):
        if isinstance(model, Wan):  # Flux's pipeline takes no other negative prompt
            with pytest.warns(UserWarning, match="second call were not what"):
                assert torch.equal(model(**arguments), plain)
            assert len(simulator.executed) == 4
        else:
            assert torch.equal(model(**arguments), plain)
        assert torch.equal(model(), plain_of(model, 0))
        assert len(simulator.executed) == len(STEPS)


def test_guidance_that_ends_early_is_noticed() -> None:
    """The second calls stop: what was computed for them must not be taken for the next step's."""
    model = Wan()
    plan = plan_for(model, ("branch",) * len(STEPS))

    def end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0 if step >= 2 else 3.0
        return {}

    arguments = {"callback_on_step_end": end}
    plain = model(**arguments)
    with intercept(model.pipe, Simulator(plan, find_denoiser(model.pipe)[1])):
        with pytest.warns(UserWarning, match="guidance may have been switched off"):
            assert torch.equal(model(**arguments), plain)
        assert torch.equal(model(), plain_of(model, 0))


def test_prompts_of_different_length_are_explained() -> None:
    model = Qwen()
    plain = model(tokens=9)
    with intercept(model.pipe, Log()), pytest.warns(UserWarning, match="pad prompt and negative prompt"):
        assert torch.equal(model(tokens=9), plain)
