"""From final latents to images, differentiably, as the pipeline's own VAE does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ir import InputError

__all__ = ["decoder_of", "stack_frames"]


def decoder_of(pipe: Any, options: Mapping[str, Any] | None = None) -> Callable[[Tensor], Tensor]:
    """A function from final latents to images [N, 3, H, W] with values in [0, 1]; see `stack_frames` for videos.

    Args:
        pipe: a diffusers pipeline; its final latents are [N, C, h, w], [N, C, f, h, w], or tokens that it can unpack.
        options: keyword arguments of its call; height and width count where latents are tokens.

    Raises:
        InputError: the pipeline has no VAE whose normalisation of latents is known.
    """
    vae = getattr(pipe, "vae", None)
    config = getattr(vae, "config", None)
    factor = getattr(config, "scaling_factor", None)
    shift = getattr(config, "shift_factor", None) or 0.0
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if vae is None or (factor is None and (mean is None or std is None)):
        raise InputError(
            f"{type(pipe).__name__} has no VAE with a scaling_factor or latents_mean and latents_std, so its latents "
            "cannot be turned into images here; profile its costs alone (--costs-only)"
        )

    def decode(latents: Tensor) -> Tensor:
        if latents.dim() == 3:
            latents = _unpacked(pipe, options or {}, latents)
        if mean is not None and std is not None:
            shape = (1, len(mean), *[1] * (latents.dim() - 2))
            latents = latents * torch.tensor(std).view(shape).to(latents) / (factor or 1.0)
            latents = latents + torch.tensor(mean).view(shape).to(latents)
        else:
            latents = latents / (factor or 1.0) + shift
        images: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        if images.dim() == 5:
            images = stack_frames(images.transpose(1, 2))
        return (images.float() / 2 + 0.5).clamp(0, 1)

    return decode


def stack_frames(video: Tensor) -> Tensor:
    """A video [N, frames, 3, H, W] as one image [N, 3, frames * H, W]: its frames, one below the other."""
    return video.transpose(1, 2).flatten(2, 3)


def _unpacked(pipe: Any, options: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """Latents [N, C, h, w] (or with frames) from the tokens [N, h * w / 4, 4 C] that some pipelines denoise."""
    unpack = getattr(pipe, "_unpack_latents", None)
    if unpack is None:
        raise InputError(
            f"{type(pipe).__name__} denoises tokens {tuple(tokens.shape)} and cannot unpack them; profile its costs "
            "alone (--costs-only)"
        )
    height, width = (
        options.get(side) or pipe.default_sample_size * pipe.vae_scale_factor for side in ("height", "width")
    )
    latents: Tensor = unpack(tokens, height, width, pipe.vae_scale_factor)
    return latents
