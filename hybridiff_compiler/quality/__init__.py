"""Image metrics and the comparison of plans against the exact run."""

from .metrics import MAX_PSNR_DB, mean_psnr, psnr, ssim

__all__ = ["MAX_PSNR_DB", "mean_psnr", "psnr", "ssim"]
