"""Image metrics between two batches of images with values in [0, 1]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["MAX_PSNR_DB", "mean_psnr", "psnr", "ssim"]

MAX_PSNR_DB = 100.0
"""Cap on an image's PSNR in a mean, so that one image that happens to be equal does not decide it."""


def psnr(images: Tensor, reference: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of each image in dB (infinite where the two are equal).

    Args:
        images, reference: [N, C, H, W] with values in [0, 1].
    """
    mse = (images.double() - reference.double()).pow(2).flatten(1).mean(dim=1)
    return [math.inf if value == 0 else -10 * math.log10(value) for value in mse.tolist()]


def mean_psnr(images: Tensor, reference: Tensor) -> float:
    """Mean over images of the PSNR in dB, each capped at `MAX_PSNR_DB`."""
    values = [min(value, MAX_PSNR_DB) for value in psnr(images, reference)]
    return sum(values) / len(values)


def ssim(images: Tensor, reference: Tensor, *, window: int = 7) -> list[float]:
    """Structural similarity of each image (uniform window, unbiased constants of Wang et al. 2004)."""
    x, y = images.double(), reference.double()
    pool = torch.nn.functional.avg_pool2d
    mx, my = pool(x, window, 1), pool(y, window, 1)
    vx, vy = pool(x * x, window, 1) - mx * mx, pool(y * y, window, 1) - my * my
    cov = pool(x * y, window, 1) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    values = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return values.flatten(1).mean(dim=1).tolist()
