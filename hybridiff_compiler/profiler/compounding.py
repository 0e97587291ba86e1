"""How the errors of single steps compound: a monotone curve through measured schedules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import isotonic_regression

from ..ir import Compounding

__all__ = ["fit_compounding"]

_WIDTH_DB = 2.5
"""Schedules whose raw values are closer than this share a knot."""


def fit_compounding(raw: Sequence[float], measured: Sequence[Sequence[float]]) -> Compounding:
    """The curve from `-20 log10(summed error)` to the measured mean PSNR.

    Neighbouring schedules are averaged into knots, and isotonic regression takes out what noise makes decrease.

    Args:
        raw: the raw value of each schedule.
        measured: PSNR in dB of each schedule, per prompt.
    """
    if not raw:
        return Compounding()
    order = np.argsort(raw)
    x, y = np.asarray(raw)[order], np.array([np.mean(row) for row in measured])[order]
    groups: list[list[int]] = [[0]]
    for index in range(1, len(x)):
        if x[index] - x[groups[-1][0]] < _WIDTH_DB:
            groups[-1].append(index)
        else:
            groups.append([index])
    centres = np.array([x[group].mean() for group in groups])
    heights = isotonic_regression([y[group].mean() for group in groups], weights=[len(g) for g in groups]).x
    knots: list[tuple[float, float]] = []
    for centre, height in zip(centres, heights):
        if not knots or height > knots[-1][1] + 1e-3:
            knots.append((round(float(centre), 4), round(float(height), 4)))
    curve = Compounding(knots=tuple(knots))
    residuals = y - np.array([curve.psnr_db(10 ** (-value / 20)) for value in x])
    return Compounding(
        knots=curve.knots,
        residual_db=round(float(np.sqrt(np.mean(residuals**2))), 4),
        prompt_std_db=round(float(np.mean([np.std(row) for row in measured])), 4),
        prompts=len(measured[0]),
        schedules=len(raw),
    )
