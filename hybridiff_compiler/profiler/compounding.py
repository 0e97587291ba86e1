"""How the errors of single steps compound: group weights and a monotone curve, fitted to measured schedules.

Errors of one kind err in like directions and add up almost coherently; different kinds (staleness, an old guidance
delta, no guidance at all) do not. So the summed error of a schedule is `sum_g w_g E_g` over the kinds g, and its mean
PSNR follows `-20 log10` of that sum (the *raw* value) along a curve that bends slowly. Weights stay near 1 unless the
measurements say otherwise (ridge). As weights multiply step errors, the planner's sums stay sums.

Each schedule is measured on one block of the prompts in turn, and the blocks' levels are fitted beside the curve: many
prompts are seen at the price of few. Leaving out a block and predicting its schedules from the others judges
predictions on schedules and prompts that the fit has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, least_squares

from ..ir import Compounding, ScheduleCheck

__all__ = ["Fit", "MeasuredSchedule", "fit_schedules", "rising_knots"]

_WIDTH_DB = 2.5
"""Schedules whose raw values are closer than this share a knot."""
_WEIGHT_SPREAD = 0.2
"""Prior standard deviation of the logarithm of a weight: a dozen schedules easily feign one that is not there."""
_NOISE_DB = 1.2
"""Standard deviation of a measured mean PSNR that the prior is weighed against."""
_RANDOM_SHARE = 0.35
"""How much a random schedule counts at a knot, a solved one being 1."""
_BLOCK_SPREAD_DB = 1.5
"""Prior standard deviation of a block's level."""
_OUTLIER_DB = 1.5
"""Distance from the curve beyond which a schedule counts less."""
_DRAW = 0.7
"""Schedules at a knot that weigh as much as the smooth curve."""
_LEAST_RISE_DB = 1e-3
"""From knot to knot: a curve rises strictly."""
_BEND_SPREAD = 0.01
"""Prior standard deviation of the bend of the curve, in dB per dB squared."""


@dataclass(frozen=True)
class MeasuredSchedule:
    """One schedule measured whole."""

    errors: Mapping[str, float]
    """Summed step errors by group."""
    psnr_db: tuple[float, ...]
    """Of each prompt that it was measured on."""
    block: int
    """Which block of the prompts."""
    kind: str
    """`solved` or `random`."""


@dataclass(frozen=True)
class Fit:
    """What the measured schedules taught."""

    weights: dict[str, float]
    """By group; the error curves are to be multiplied by them."""
    compounding: Compounding


def fit_schedules(measured: Sequence[MeasuredSchedule]) -> Fit:
    """Weights, curve and cross-validation from schedules measured whole.

    Raises:
        ValueError: a schedule has no error at all.
    """
    if not measured:
        return Fit({}, Compounding())
    groups = sorted({group for each in measured for group in each.errors})
    table = np.array([[each.errors.get(group, 0.0) for group in groups] for each in measured])
    if not (table.sum(axis=1) > 0).all():
        raise ValueError("exact schedules teach nothing about errors")
    means = np.array([np.mean(each.psnr_db) for each in measured])
    blocks = np.array([each.block for each in measured])
    model = _solve(table, means, blocks)
    raw = model.raw(table)
    spread = [float(np.std(each.psnr_db, ddof=1)) if len(each.psnr_db) > 1 else 0.0 for each in measured]
    known = [std for std, each in zip(spread, measured) if len(each.psnr_db) > 1]
    prompts = sum({each.block: len(each.psnr_db) for each in measured}.values())
    predicted = _across_blocks(table, means, blocks)
    checks = tuple(
        ScheduleCheck(
            kind=each.kind, raw_db=_rounded(value), predicted_db=_rounded(forecast), measured_db=_rounded(mean),
            std_db=_rounded(std), prompts=len(each.psnr_db),
        )
        for each, value, forecast, mean, std in zip(measured, raw, predicted, means, spread)
        if math.isfinite(forecast)
    )
    planned = np.array([each.kind == "solved" for each in measured])
    return Fit(
        weights={group: float(f"{weight:.4g}") for group, weight in zip(groups, model.weights)},
        compounding=Compounding(
            knots=rising_knots(raw, model.level(means, blocks), model.predict(table), planned),
            residual_db=_rounded(_left_out_residual(table, means, blocks, planned if planned.any() else ~planned)),
            prompt_std_db=_rounded(float(np.mean(known or [0.0]))), prompts=prompts, schedules=len(measured),
            checks=checks,
        ),
    )


@dataclass(frozen=True)
class _Model:
    """PSNR = base + slope x + bend x^2 + offset of the block, x = raw - centre; offsets sum to zero."""

    weights: NDArray[np.float64]
    curve: NDArray[np.float64]
    """base, slope, bend."""
    offsets: dict[int, float]
    """By block."""
    centre: float

    def raw(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        return -20 * np.log10(table @ self.weights)

    def predict(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean over the blocks of the fit."""
        x = self.raw(table) - self.centre
        return self.curve[0] + self.curve[1] * x + self.curve[2] * x**2

    def level(self, means: NDArray[np.float64], blocks: NDArray[np.int64]) -> NDArray[np.float64]:
        """Measured means as they would be over all blocks of the fit."""
        return means - np.array([self.offsets.get(block, 0.0) for block in blocks.tolist()])


def _solve(table: NDArray[np.float64], means: NDArray[np.float64], blocks: NDArray[np.int64]) -> _Model:
    """Maximum a posteriori fit (nonlinear least squares with the priors as further residuals)."""
    groups = table.shape[1]
    centre = float(np.median(-20 * np.log10(table.sum(axis=1))))
    names = sorted(set(blocks.tolist()))

    def unpack(x: NDArray[np.float64]) -> _Model:
        offsets = x[groups + 3 :] - x[groups + 3 :].mean()
        return _Model(np.exp(x[:groups]), x[groups : groups + 3], dict(zip(names, offsets.tolist())), centre)

    def residuals(x: NDArray[np.float64]) -> NDArray[np.float64]:
        model = unpack(x)
        misses = (model.level(means, blocks) - model.predict(table)) / _NOISE_DB
        priors = [x[:groups] / _WEIGHT_SPREAD, [(model.curve[1] - 1.0) / 0.3, model.curve[2] / _BEND_SPREAD]]
        return np.concatenate([misses, *priors, x[groups + 3 :] / _BLOCK_SPREAD_DB])

    start = np.concatenate([np.zeros(groups), [float(means.mean()), 1.0, 0.0], np.zeros(len(names))])
    return unpack(least_squares(residuals, start, loss="soft_l1", f_scale=_OUTLIER_DB / _NOISE_DB).x)


def _across_blocks(
    table: NDArray[np.float64], means: NDArray[np.float64], blocks: NDArray[np.int64]
) -> NDArray[np.float64]:
    """For each schedule the prediction of a fit to the schedules of the other blocks; NaN where there are none."""
    predicted = np.full(len(means), np.nan)
    for block in set(blocks.tolist()):
        seen = blocks != block
        if seen.any():
            predicted[~seen] = _solve(table[seen], means[seen], blocks[seen]).predict(table[~seen])
    return predicted


def _left_out_residual(
    table: NDArray[np.float64], means: NDArray[np.float64], blocks: NDArray[np.int64], judged: NDArray[np.bool_]
) -> float:
    """Root mean square of what fits without one of the `judged` schedules miss it by, prompts being known."""
    if len(means) < 3:
        return 0.0
    misses = []
    for index in np.flatnonzero(judged):
        kept = np.arange(len(means)) != index
        model = _solve(table[kept], means[kept], blocks[kept])
        misses.append(model.level(means, blocks)[index] - model.predict(table)[index])
    return float(np.sqrt(np.mean(np.square(misses))))


def rising_knots(
    x: NDArray[np.float64], y: NDArray[np.float64], smooth: NDArray[np.float64], solved: NDArray[np.bool_],
) -> tuple[tuple[float, float], ...]:
    """Neighbours averaged into knots; isotonic regression takes out what noise makes decrease.

    Args:
        x: raw values of the schedules.
        y: their PSNR, dB.
        smooth: a smooth curve's PSNR at `x`, towards which knots are drawn the more the fewer schedules they have.
        solved: which schedules count most: plans are made of such, and the planner's choice of what looks best makes
            their errors larger than they look.

    Returns:
        (raw value, PSNR) of every knot, rising in both.
    """
    order = np.argsort(x)
    x, y = x[order], y[order]
    base = smooth[order]
    planned = solved[order] if solved.any() else np.ones(len(x), dtype=bool)
    count = np.where(planned, 1.0, _RANDOM_SHARE)
    misses = np.where(planned, y - base, np.clip(y - base, -_OUTLIER_DB, _OUTLIER_DB))
    groups: list[list[int]] = [[0]]
    for index in range(1, len(x)):
        if x[index] - x[groups[-1][0]] < _WIDTH_DB:
            groups[-1].append(index)
        else:
            groups.append([index])
    centres = [float(np.average(x[g], weights=count[g])) for g in groups]
    totals = np.array([count[g].sum() for g in groups])
    means = [
        np.average(base[g], weights=count[g]) + total / (total + _DRAW) * np.average(misses[g], weights=count[g])
        for g, total in zip(groups, totals)
    ]
    heights = isotonic_regression(means, weights=totals).x
    knots: list[tuple[float, float]] = []
    for centre, height in zip(centres, heights.tolist()):
        # A flat part keeps both its ends: the curve must not rise where what was measured does not.
        least = knots[-1][1] + _LEAST_RISE_DB if knots else -math.inf
        knots.append((_rounded(centre), _rounded(max(height, least))))
    return tuple(knots)


def _rounded(value: float) -> float:
    return round(float(value), 4)
