"""Quality for most prompts instead of on average.

Model: the PSNR of a schedule is normal over prompts. Its standard deviation is that of the schedules which the profile
measured: a straight line over their mean PSNR where the profile kept them one by one (`Compounding.checks`; prompts
differ less at high quality, never more), else one number for all (`prompt_std_db`).

Checked with tools/measure_prompts.py, 24 prompts, mean PSNR as measured and one standard deviation for all: on held-out
prompts of the U-Net 5 % quantiles of 44.0, 36.4 and 32.4 dB are expected for three schedules and 43.7, 37.4 and 31.5 dB
measured; on the profiled prompts 40.6 and 35.9 dB for two of the MMDiT, 40.4 and 33.9 dB measured.
"""

from __future__ import annotations

import math
from statistics import NormalDist, fmean

from ..ir import Compounding, InputError, UsageError

__all__ = ["check_quantile", "prompt_std_db", "quantile_offset_db", "quantile_reserve_db"]

_ONE_SIDED_95 = 1.645
_LEAST_CHECKS = 6


def check_quantile(quantile: float) -> None:
    """Refuse what is no quantile.

    Raises:
        UsageError: it does not lie between 0 and 1.
    """
    if not 0 < quantile < 1:
        raise UsageError(
            f"got quantile={quantile:g}; give the share of prompts that may be worse than the target, between 0 and 1, "
            "e.g. 0.05"
        )


def prompt_std_db(compounding: Compounding, mean_db: float) -> float:
    """Standard deviation of the PSNR over prompts of a schedule of that mean; constant beyond the measured ones."""
    checks = compounding.checks
    if len(checks) < _LEAST_CHECKS:
        return compounding.prompt_std_db
    levels, spreads = [check.measured_db for check in checks], [check.std_db for check in checks]
    middle, typical = fmean(levels), fmean(spreads)
    variance = math.fsum((level - middle) ** 2 for level in levels)
    together = math.fsum((x - middle) * (y - typical) for x, y in zip(levels, spreads))
    slope = min(0.0, together / variance) if variance > 0 else 0.0
    inside = min(max(mean_db, min(levels)), max(levels))
    return max(0.0, typical + slope * (inside - middle))


def quantile_offset_db(compounding: Compounding, quantile: float, mean_db: float) -> float:
    """That quantile of the PSNR over prompts minus the mean, in dB (negative below the median), for a schedule of mean
    `mean_db`.

    Raises:
        UsageError: it is no quantile.
        InputError: the profile did not measure how prompts differ.
    """
    check_quantile(quantile)
    if compounding.prompts < 2:
        raise InputError(
            "the profile did not measure how the PSNR differs between prompts, so a quantile cannot be predicted (it "
            f"measured whole schedules on {compounding.prompts}); leave --quantile out or profile the model again with "
            "a dozen prompts or more"
        )
    return NormalDist().inv_cdf(quantile) * prompt_std_db(compounding, mean_db)


def quantile_reserve_db(compounding: Compounding, quantile: float) -> float:
    """What to keep in reserve so that the quantile over other prompts is met with a probability of 95 %.

    For n measured prompts it is the one-sided tolerance limit of a normal sample (Owen, 1968, Technometrics 10: the
    quantile of a noncentral t distribution) beyond the estimate itself; the curve's residual adds to it.
    """
    from scipy.stats import nct

    z, count = NormalDist().inv_cdf(quantile), max(2, compounding.prompts)
    factor = float(nct.ppf(0.95, count - 1, -z * math.sqrt(count))) / math.sqrt(count)
    spread = compounding.prompt_std_db
    sampling = max(0.0, factor * spread * math.sqrt(count / (count - 1)) + z * spread)
    return math.hypot(_ONE_SIDED_95 * compounding.residual_db, sampling)
