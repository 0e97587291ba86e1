"""Profile, plan and verify a stock pipeline that asks for its two branches one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

import hybridiff_compiler as hc
from hybridiff_compiler import reference_models

OPTIONS: dict[str, Any] = {"height": 32, "width": 32, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    """Flux with true guidance, everything tiny and random; latents are tokens, the guidance scale `true_cfg_scale`."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "cat": 3, "red": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    clip = CLIPTokenizer.from_pretrained(reference_models.path("unet") / "tokenizer_2")
    pipe = FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.4, shift_factor=0.1,
        ).eval(),
        text_encoder=CLIPTextModel(CLIPTextConfig(
            vocab_size=len(clip), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            projection_dim=16,
        )).eval(),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ).eval(),
        tokenizer_2=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=8
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_profile_plan_verify(pipe: FluxPipeline) -> None:
    profile = hc.profile(
        pipe, prompts=["a cat", "a red cat"], num_inference_steps=8, guidance_scale=3.0, threads=1, quick=True,
        gpus=(2,), **OPTIONS,
    )
    assert profile.num_steps == 8
    plan = hc.plan(profile, gpus=2, min_psnr=20)
    assert plan.predictions.work_speedup is not None
    assert plan.predictions.work_speedup > 2
    report = hc.verify(pipe, plan, prompts=["a red cat"], guidance_scale=3.0, **OPTIONS)
    assert report.simulator_max_abs_diff == 0
    assert 20 < report.psnr_db < 60
    exact = hc.verify(
        pipe, hc.plan(profile, gpus=2, policy="exact"), prompts=["a red cat"], guidance_scale=3.0, **OPTIONS
    )
    assert exact.max_abs_diff < 1e-5
