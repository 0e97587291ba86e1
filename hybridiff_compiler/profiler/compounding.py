"""How the errors of single steps compound: a line through measured schedules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ir import Compounding

__all__ = ["fit_compounding"]


def fit_compounding(raw: Sequence[float], measured: Sequence[float]) -> Compounding:
    """Least-squares line from summed-error dB to measured PSNR; needs three points that are not all alike."""
    if len(raw) < 3 or np.ptp(raw) < 1.0:
        offset = float(np.mean(np.subtract(measured, raw))) if raw else 0.0
        return Compounding(intercept=round(offset, 3), schedules=len(raw))
    slope, intercept = np.polyfit(raw, measured, 1)
    slope = max(float(slope), 0.1)
    intercept = float(np.mean(np.subtract(measured, slope * np.asarray(raw))))
    residual = float(np.sqrt(np.mean((np.asarray(measured) - intercept - slope * np.asarray(raw)) ** 2)))
    return Compounding(
        intercept=round(intercept, 4), slope=round(slope, 5), residual_db=round(residual, 4), schedules=len(raw)
    )
