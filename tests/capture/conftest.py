"""Tiny denoisers with random weights, captured once per session."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

os.environ.setdefault("USE_FLAX", "0")

from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)

from hybridiff_compiler.capture import CapturedDenoiser, StageGraph, capture, flatten_call

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 32,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "norm_num_groups": 8,
}
SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 12,
}


def _unet() -> tuple[nn.Module, dict[str, Any]]:
    added = {"text_embeds": torch.randn(1, 16), "time_ids": torch.ones(1, 6)}
    call = {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor(981), "added_cond_kwargs": added}
    return UNet2DConditionModel(**UNET), {**call, "encoder_hidden_states": torch.randn(1, 7, 32)}


def _sd3() -> tuple[nn.Module, dict[str, Any]]:
    text = {"encoder_hidden_states": torch.randn(1, 5, 24), "pooled_projections": torch.randn(1, 16)}
    return SD3Transformer2DModel(**SD3), {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([981.0]),
        **text,
    }


def _pixart() -> tuple[nn.Module, dict[str, Any]]:
    model = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=3,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=24,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )
    added = {"resolution": None, "aspect_ratio": None}
    text = {"encoder_hidden_states": torch.randn(1, 5, 24), "encoder_attention_mask": torch.ones(1, 5)}
    return model, {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([981]),
        "added_cond_kwargs": added,
        **text,
    }


def _flux() -> tuple[nn.Module, dict[str, Any]]:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    text = {"encoder_hidden_states": torch.randn(1, 6, 32), "pooled_projections": torch.randn(1, 32)}
    ids = {"img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(6, 3)}
    return model, {
        "hidden_states": torch.randn(1, 16, 4),
        "timestep": torch.tensor([0.9]),
        "guidance": torch.tensor([3.5]),
        **text,
        **ids,
    }


def _wan() -> tuple[nn.Module, dict[str, Any]]:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([981]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
    }


BUILDERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "unet": _unet,
    "sd3": _sd3,
    "pixart": _pixart,
    "flux": _flux,
    "wan": _wan,
}


@dataclass(frozen=True)
class Case:
    """A denoiser, one call of it, and everything the tests compare against."""

    denoiser: nn.Module
    kwargs: dict[str, Any]
    captured: CapturedDenoiser
    tensors: dict[str, torch.Tensor]
    estimate: torch.Tensor
    values: dict[str, torch.Tensor]
    """Every value of the layer graph, exactly as the whole denoiser computes it."""

    def run(self, stage: StageGraph, values: dict[str, torch.Tensor], *, copy: bool = True) -> tuple[torch.Tensor, ...]:
        """Run a stage on this call's inputs; boundary values arrive as contiguous copies, as after a transfer."""
        read = [values[name] for name in stage.values_in]
        if copy:
            read = [value.clone(memory_format=torch.contiguous_format) for value in read]
        with torch.no_grad():
            return stage.module(*[self.tensors[path] for path in stage.inputs], *read)


@pytest.fixture(scope="session")
def make_case() -> Callable[[str], Case]:
    """`make_case(name)`: the case of this name, made once."""
    cases: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in cases:
            torch.manual_seed(0)
            cases[name] = build_case(*BUILDERS[name]())
        return cases[name]

    return make


def build_case(denoiser: nn.Module, kwargs: dict[str, Any]) -> Case:
    kwargs = {**kwargs, "return_dict": False}
    for parameter in denoiser.parameters():  # zero-initialised outputs would make every comparison trivial
        nn.init.normal_(parameter.data, std=0.2) if not parameter.data.any() else None
    captured = capture(denoiser.eval(), (), kwargs)
    _, tensors = flatten_call(denoiser, (), kwargs)
    names = [value.name for value in captured.layers.values]
    with torch.no_grad():
        estimate = denoiser(**kwargs)[0]
        whole = captured.whole(names)
        outputs = whole.module(*[tensors[path] for path in whole.inputs])
    return Case(denoiser, kwargs, captured, tensors, estimate, dict(zip(names, outputs[1:])))


@pytest.fixture(scope="session")
def unet(make_case: Callable[[str], Case]) -> Case:
    return make_case("unet")


@pytest.fixture(scope="session")
def sd3(make_case: Callable[[str], Case]) -> Case:
    return make_case("sd3")
