"""Image metrics and the comparison of plans against the exact run."""

from .metrics import mean_psnr, psnr, ssim

__all__ = ["mean_psnr", "psnr", "ssim"]
