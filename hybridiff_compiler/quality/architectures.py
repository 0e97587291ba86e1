"""Well-known architectures from their configuration alone, with random weights: for latency only, never for images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..ir import InputError, UsageError
from ..runtime.intercept import find_denoiser

__all__ = ["ARCHITECTURES", "SD3_TRANSFORMER", "SDXL_UNET", "RandomModel", "random_model"]

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


@dataclass(frozen=True)
class RandomModel:
    """A stock diffusers pipeline around a denoiser with random weights, without text encoders and VAE."""

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


def random_model(name: str, *, device: str, dtype: torch.dtype) -> RandomModel:
    """Build the architecture `name` on `device` with random weights.

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
    return model


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
