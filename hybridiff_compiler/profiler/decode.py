"""From final latents to images, differentiably, as the pipeline's own VAE does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ir import InputError

__all__ = ["decoder_of"]


def decoder_of(pipe: Any) -> Callable[[Tensor], Tensor]:
    """A function from final latents [N, C, h, w] to images [N, 3, H, W] with values in [0, 1].

    Raises:
        InputError: the pipeline has no image VAE with a scaling factor.
    """
    vae = getattr(pipe, "vae", None)
    config = getattr(vae, "config", None)
    factor = getattr(config, "scaling_factor", None)
    if vae is None or factor is None:
        raise InputError(
            f"{type(pipe).__name__} has no VAE with a scaling_factor; pass decode=, a differentiable function from "
            "final latents to images in [0, 1]"
        )
    shift = getattr(config, "shift_factor", None) or 0.0
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)

    def decode(latents: Tensor) -> Tensor:
        if mean is not None and std is not None:
            shape = (1, len(mean), *[1] * (latents.dim() - 2))
            latents = latents * torch.tensor(std).view(shape).to(latents) / factor
            latents = latents + torch.tensor(mean).view(shape).to(latents)
        else:
            latents = latents / factor + shift
        images: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    return decode
