"""How the errors of single steps compound: a line through measured schedules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ir import Compounding

__all__ = ["fit_compounding"]


def fit_compounding(raw: Sequence[float], measured: Sequence[Sequence[float]]) -> Compounding:
    """Least-squares line from summed-error dB to the measured mean PSNR.

    Args:
        raw: `-20 log10(summed error)` of each schedule.
        measured: PSNR in dB of each schedule, per prompt.

    With fewer than three schedules, or schedules all alike, the slope stays one.
    """
    if not raw:
        return Compounding()
    means = np.array([np.mean(row) for row in measured])
    slope = 1.0
    if len(raw) >= 3 and np.ptp(raw) >= 1.0:
        slope = max(float(np.polyfit(raw, means, 1)[0]), 0.1)
    residuals = means - slope * np.asarray(raw)
    return Compounding(
        intercept=round(float(residuals.mean()), 4),
        slope=round(slope, 5),
        residual_db=round(float(residuals.std()), 4),
        prompt_std_db=round(float(np.mean([np.std(row) for row in measured])), 4),
        prompts=len(measured[0]),
        schedules=len(raw),
    )
