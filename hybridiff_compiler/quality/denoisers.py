"""Denoisers of well-known architectures with random weights and one branch's call: for costs only, never for images.

Nothing is downloaded. Sizes are those of the published configurations, calls those that the stock pipelines make at
the usual resolution. Names that end in `-tiny` are the same architectures shrunk until a CPU runs them in
milliseconds, for rehearsals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..capture.call import TIMESTEP, dtype_from_name, unflatten_call
from ..capture.meta import cast_checkpoint
from ..ir import InputError, UsageError
from .architectures import SD3_TRANSFORMER, SDXL_UNET

__all__ = ["DENOISERS", "DenoiserSpec", "RandomDenoiser", "build_denoiser", "random_denoiser"]

PIXART_SIGMA: Mapping[str, Any] = {
    "sample_size": 128, "num_layers": 28, "patch_size": 2, "attention_head_dim": 72, "num_attention_heads": 16,
    "in_channels": 4, "out_channels": 8, "cross_attention_dim": 1152, "caption_channels": 4096,
    "attention_bias": True, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6, "interpolation_scale": 2,
    "use_additional_conditions": False,
}
FLUX_DEV: Mapping[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
WAN_1_3B: Mapping[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
}

_FLOATING = "float"
"""Stands for the denoiser's dtype in a call."""


@dataclass(frozen=True, kw_only=True)
class DenoiserSpec:
    """One architecture at one size."""

    denoiser: str
    """Class in diffusers."""
    config: Mapping[str, Any]
    call: Mapping[str, tuple[tuple[int, ...], str]]
    """Leaf path -> shape and dtype (`float`: the denoiser's) of one branch's call; a leading 1 is the image batch."""
    constants: Mapping[str, Any]
    """Leaf path -> value of what is no tensor."""
    dtype: str
    """What it is usually run in on a GPU."""
    steps: int
    """Usual number of denoising steps."""
    guidance_scale: float


@dataclass(frozen=True)
class RandomDenoiser:
    """A denoiser with random weights and one branch's call of it."""

    spec: DenoiserSpec
    denoiser: nn.Module
    call: dict[str, Any]
    """Keyword arguments; random tensors on the denoiser's device."""


def random_denoiser(name: str, *, device: str, dtype: str | None = None, seed: int = 0) -> RandomDenoiser:
    """Build the architecture `name` (one of `DENOISERS`) on `device`, which may be `meta`.

    Args:
        name: of the architecture.
        device: torch device.
        dtype: torch dtype name; default: the architecture's usual one, float32 on a CPU.
        seed: of the weights and of the call.

    Raises:
        UsageError: unknown name.
        InputError: the device is not there, or torch has no such dtype.
    """
    spec = _spec(name)
    denoiser = build_denoiser(name, device=device, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    floating = dtype_from_name(_dtype_name(spec, device, dtype))
    call: dict[str, Any] = {}
    for path, (shape, kind) in spec.call.items():
        exact = floating if kind == _FLOATING else dtype_from_name(kind)
        if path == TIMESTEP:
            value = torch.full(shape, 500.0)
        elif exact.is_floating_point:
            value = torch.randn(shape, generator=generator)
        else:
            value = torch.ones(shape)
        call[path] = value.to(device, exact)
    return RandomDenoiser(spec, denoiser, unflatten_call({**call, **spec.constants}))


def build_denoiser(name: str, *, device: str, dtype: str | None = None, seed: int = 0) -> nn.Module:
    """The denoiser alone; see `random_denoiser`."""
    import diffusers

    spec = _spec(name)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise InputError("this machine has no CUDA device; pass --device cpu, or run on a machine with one")
    wanted = dtype_from_name(_dtype_name(spec, device, dtype))
    before = torch.get_default_dtype()
    torch.set_default_dtype(wanted)
    torch.manual_seed(seed)
    try:
        with torch.device(device):
            denoiser: nn.Module = getattr(diffusers, spec.denoiser)(**spec.config)
    finally:
        torch.set_default_dtype(before)
    return cast_checkpoint(denoiser, wanted).eval().requires_grad_(False)


def _spec(name: str) -> DenoiserSpec:
    if name not in DENOISERS:
        raise UsageError(f"unknown architecture {name!r}; with random weights there are {', '.join(DENOISERS)}")
    return DENOISERS[name]


def _dtype_name(spec: DenoiserSpec, device: str, dtype: str | None) -> str:
    return dtype or ("float32" if torch.device(device).type == "cpu" else spec.dtype)


def _sdxl(config: Mapping[str, Any], pixels: int, tokens: int, width: int, pooled: int) -> DenoiserSpec:
    return DenoiserSpec(
        denoiser="UNet2DConditionModel", config=config, dtype="float16", steps=50, guidance_scale=5.0,
        call={
            "sample": ((1, 4, pixels // 8, pixels // 8), _FLOATING), "timestep": ((), "float32"),
            "encoder_hidden_states": ((1, tokens, width), _FLOATING),
            "added_cond_kwargs.text_embeds": ((1, pooled), _FLOATING),
            "added_cond_kwargs.time_ids": ((1, 6), _FLOATING),
        },
        constants={"return_dict": False},
    )


def _sd3(config: Mapping[str, Any], pixels: int, tokens: int) -> DenoiserSpec:
    return DenoiserSpec(
        denoiser="SD3Transformer2DModel", config=config, dtype="float16", steps=50, guidance_scale=7.0,
        call={
            "hidden_states": ((1, config["in_channels"], pixels // 8, pixels // 8), _FLOATING),
            "encoder_hidden_states": ((1, tokens, config["joint_attention_dim"]), _FLOATING),
            "pooled_projections": ((1, config["pooled_projection_dim"]), _FLOATING), "timestep": ((1,), "float32"),
        },
        constants={"return_dict": False},
    )


def _pixart(config: Mapping[str, Any], pixels: int, tokens: int) -> DenoiserSpec:
    return DenoiserSpec(
        denoiser="PixArtTransformer2DModel", config=config, dtype="float16", steps=20, guidance_scale=4.5,
        call={
            "hidden_states": ((1, 4, pixels // 8, pixels // 8), _FLOATING),
            "encoder_hidden_states": ((1, tokens, config["caption_channels"]), _FLOATING),
            "timestep": ((1,), "int64"), "encoder_attention_mask": ((1, tokens), "int64"),
        },
        constants={
            "added_cond_kwargs.resolution": None, "added_cond_kwargs.aspect_ratio": None, "return_dict": False,
        },
    )


def _flux(config: Mapping[str, Any], pixels: int, tokens: int) -> DenoiserSpec:
    patches = (pixels // 16) ** 2
    return DenoiserSpec(
        denoiser="FluxTransformer2DModel", config=config, dtype="bfloat16", steps=28, guidance_scale=3.5,
        call={
            "hidden_states": ((1, patches, config["in_channels"]), _FLOATING),
            "encoder_hidden_states": ((1, tokens, config["joint_attention_dim"]), _FLOATING),
            "pooled_projections": ((1, config["pooled_projection_dim"]), _FLOATING), "timestep": ((1,), _FLOATING),
            "img_ids": ((patches, 3), _FLOATING), "txt_ids": ((tokens, 3), _FLOATING), "guidance": ((1,), "float32"),
        },
        constants={"return_dict": False},
    )


def _wan(config: Mapping[str, Any], latent: tuple[int, int, int], tokens: int) -> DenoiserSpec:
    return DenoiserSpec(
        denoiser="WanTransformer3DModel", config=config, dtype="bfloat16", steps=50, guidance_scale=5.0,
        call={
            "hidden_states": ((1, config["in_channels"], *latent), _FLOATING), "timestep": ((1,), "int64"),
            "encoder_hidden_states": ((1, tokens, config["text_dim"]), _FLOATING),
        },
        constants={"return_dict": False},
    )


_TINY_UNET = dict(SDXL_UNET) | {
    "sample_size": 8, "block_out_channels": (32, 64), "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 8,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "cross_attention_dim": 32,
    "attention_head_dim": (2, 4), "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64,
}
_TINY_SD3 = dict(SD3_TRANSFORMER) | {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 16,
    "pos_embed_max_size": 12,
}
_TINY_PIXART = dict(PIXART_SIGMA) | {
    "sample_size": 8, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 3, "cross_attention_dim": 24,
    "caption_channels": 24,
}
_TINY_FLUX = dict(FLUX_DEV) | {
    "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
}
_TINY_WAN = dict(WAN_1_3B) | {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
}

DENOISERS: Mapping[str, DenoiserSpec] = {
    "sdxl": _sdxl(SDXL_UNET, 1024, 77, 2048, 1280), "sd3": _sd3(SD3_TRANSFORMER, 1024, 333),
    "pixart": _pixart(PIXART_SIGMA, 1024, 300), "flux": _flux(FLUX_DEV, 1024, 512),
    "wan": _wan(WAN_1_3B, (21, 60, 104), 512),
    "sdxl-tiny": _sdxl(_TINY_UNET, 64, 7, 32, 16), "sd3-tiny": _sd3(_TINY_SD3, 64, 5),
    "pixart-tiny": _pixart(_TINY_PIXART, 64, 5), "flux-tiny": _flux(_TINY_FLUX, 64, 6),
    "wan-tiny": _wan(_TINY_WAN, (2, 8, 8), 6),
}
"""SDXL, SD3-medium, PixArt-Sigma and Flux-dev at 1024 px; Wan 2.1 1.3B at 480p and 81 frames (latent 16x21x60x104)."""
