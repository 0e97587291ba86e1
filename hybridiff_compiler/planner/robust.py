"""Quality for most prompts instead of on average.

Model: whatever the schedule, the PSNR over prompts is normal around its mean with the standard deviation that the
profile measured on whole schedules (`Compounding.prompt_std_db`): some prompts move more than others, and by about the
same number of decibels at every error level.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from ..ir import Compounding, InputError, UsageError

__all__ = ["check_quantile", "quantile_offset_db", "quantile_reserve_db"]

_ONE_SIDED_95 = 1.645


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


def quantile_offset_db(compounding: Compounding, quantile: float) -> float:
    """That quantile of the PSNR over prompts minus the mean, in dB (negative below the median).

    Raises:
        UsageError: it is no quantile.
        InputError: the profile did not measure how prompts differ.
    """
    check_quantile(quantile)
    if not compounding.prompts:
        raise InputError(
            "the profile did not measure how the PSNR differs between prompts, so a quantile cannot be predicted; "
            "leave --quantile out or profile the model again with a dozen prompts or more"
        )
    return NormalDist().inv_cdf(quantile) * compounding.prompt_std_db


def quantile_reserve_db(compounding: Compounding, quantile: float) -> float:
    """What to keep in reserve so that the quantile over other prompts is met with a probability of 95 %.

    The standard error of `mean + z std` estimated from n normal samples is `std sqrt((1 + z^2 / 2) / n)`; the curve's
    residual adds to it.
    """
    z = NormalDist().inv_cdf(quantile)
    sampling = compounding.prompt_std_db * math.sqrt((1 + z * z / 2) / max(1, compounding.prompts))
    return _ONE_SIDED_95 * math.hypot(compounding.residual_db, sampling)
