"""Well-known architectures from their configuration alone, with random weights: for latency only, never for images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..ir import InputError, UsageError
from ..runtime.intercept import find_denoiser

__all__ = ["ARCHITECTURES", "SD3_TRANSFORMER", "SDXL_UNET", "VAES", "RandomModel", "random_model", "random_vae"]

SDXL_UNET: Mapping[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SDXL_SCHEDULER: Mapping[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "timestep_spacing": "leading",
}
SD3_TRANSFORMER: Mapping[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}

_VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}
VAES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "sdxl": (dict(_VAE) | {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True}, "float32"),
    "sd3": (
        dict(_VAE) | {
            "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "float16",
    ),
}
"""Architecture -> configuration of its AutoencoderKL, and the dtype that its pipeline decodes in on a GPU."""


@dataclass(frozen=True)
class RandomModel:
    """A stock diffusers pipeline around a denoiser with random weights, without text encoders."""

    pipe: Any
    tokens: int
    """Length of the prompt embeddings."""
    width: int
    pooled: int
    """Width of the prompt embeddings, and of the pooled ones."""

    def options(self, pixels: int, seed: int) -> dict[str, Any]:
        """Keyword arguments of a call that returns latents: random embeddings in place of a prompt."""
        generator = torch.Generator().manual_seed(seed)
        parameter = next(find_denoiser(self.pipe)[1].parameters())

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype)

        return {
            "prompt_embeds": random(1, self.tokens, self.width), "pooled_prompt_embeds": random(1, self.pooled),
            "negative_prompt_embeds": random(1, self.tokens, self.width),
            "negative_pooled_prompt_embeds": random(1, self.pooled), "height": pixels, "width": pixels,
            "generator": torch.Generator().manual_seed(seed), "output_type": "latent",
        }


def random_model(name: str, *, device: str, dtype: torch.dtype, vae: bool = False) -> RandomModel:
    """Build the architecture `name` on `device` with random weights.

    Args:
        name: one of `ARCHITECTURES`.
        device: cpu or cuda.
        dtype: of all weights.
        vae: with the architecture's VAE; without one a pipeline can only return latents.

    Raises:
        UsageError: unknown name.
        InputError: the device is not there.
    """
    if name not in ARCHITECTURES:
        raise UsageError(f"unknown architecture {name!r}; with random weights there are {', '.join(ARCHITECTURES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("this machine has no CUDA device; pass --device cpu, or run on a machine with one")
    model = ARCHITECTURES[name](device, dtype)
    model.pipe.set_progress_bar_config(disable=True)
    if vae:
        model.pipe.register_modules(vae=random_vae(name, device=device, dtype=dtype))
    return model


def random_vae(name: str, *, device: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Build the VAE of the architecture `name` with random weights, by default in the dtype that it decodes in.

    Raises:
        UsageError: unknown name.
        InputError: the device is not there.
    """
    from diffusers import AutoencoderKL

    if name not in VAES:
        raise UsageError(f"unknown architecture {name!r}; with random weights there are {', '.join(VAES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("this machine has no CUDA device; pass --device cpu, or run on a machine with one")
    config, own = VAES[name]
    default: torch.dtype = getattr(torch, own) if device == "cuda" else torch.float32
    return _build(lambda: AutoencoderKL(**config), device, dtype or default)


def _sdxl(device: str, dtype: torch.dtype) -> RandomModel:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    pipe = StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=_build(lambda: UNet2DConditionModel(**SDXL_UNET), device, dtype),
        scheduler=EulerDiscreteScheduler(**_SDXL_SCHEDULER), add_watermarker=False,
    )
    return RandomModel(pipe, tokens=77, width=2048, pooled=1280)


def _sd3(device: str, dtype: torch.dtype) -> RandomModel:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline(
        transformer=_build(lambda: SD3Transformer2DModel(**SD3_TRANSFORMER), device, dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )
    return RandomModel(pipe, tokens=333, width=4096, pooled=2048)


def _build(make: Callable[[], torch.nn.Module], device: str, dtype: torch.dtype) -> torch.nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


ARCHITECTURES: Mapping[str, Callable[[str, torch.dtype], RandomModel]] = {"sdxl": _sdxl, "sd3": _sd3}
"""Name -> builder of the pipeline on a device."""
