"""Quantiles of quality over prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.ir import Compounding, InputError, ScheduleCheck, UsageError
from hybridiff_compiler.planner.robust import check_quantile, prompt_std_db, quantile_offset_db, quantile_reserve_db


def compounding(levels: list[float], spreads: list[float]) -> Compounding:
    checks = tuple(
        ScheduleCheck(kind="solved", raw_db=level, predicted_db=level, measured_db=level, std_db=spread, prompts=8)
        for level, spread in zip(levels, spreads)
    )
    return Compounding(prompt_std_db=3.0, prompts=24, residual_db=0.4, checks=checks)


def test_one_spread_for_all_where_nothing_else_is_known() -> None:
    known = compounding([], [])
    assert prompt_std_db(known, 20.0) == prompt_std_db(known, 60.0) == 3.0
    rng = np.random.default_rng(0)
    sample = 30 + 3.0 * rng.normal(size=200_000)
    for share in (0.01, 0.05, 0.5, 0.9):
        assert 30 + quantile_offset_db(known, share, 30.0) == pytest.approx(np.quantile(sample, share), abs=0.05)


def test_spread_follows_the_measured_schedules_downwards_only() -> None:
    falling = compounding([20, 25, 30, 35, 40, 45], [6, 5, 4, 3, 2, 1])
    assert prompt_std_db(falling, 30.0) == pytest.approx(4.0)
    assert prompt_std_db(falling, 60.0) == pytest.approx(1.0)
    assert prompt_std_db(falling, 0.0) == pytest.approx(6.0)
    rising = compounding([20, 25, 30, 35, 40, 45], [1, 2, 3, 4, 5, 6])
    assert prompt_std_db(rising, 20.0) == prompt_std_db(rising, 45.0) == pytest.approx(3.5)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(15, 60), st.floats(0, 10)), min_size=6, max_size=12), st.floats(0.001, 0.5),
    st.floats(10, 70), st.floats(0, 10),
)
def test_better_schedules_have_better_quantiles(
    measured: list[tuple[float, float]], share: float, level: float, more: float
) -> None:
    known = compounding([x for x, _ in measured], [y for _, y in measured])
    low, high = (mean + quantile_offset_db(known, share, mean) for mean in (level, level + more))
    assert high >= low - 1e-9
    assert quantile_offset_db(known, share, level) <= 1e-9


def test_the_reserve_covers_the_estimate_from_few_prompts() -> None:
    """Of many repeated profiles of 24 prompts, the promised quantile holds in 95 of 100."""
    rng = np.random.default_rng(1)
    kept = 0
    for _ in range(2000):
        sample = 3.0 * rng.normal(size=24)
        known = Compounding(prompt_std_db=float(sample.std()), prompts=24)
        promised = sample.mean() + quantile_offset_db(known, 0.05, 30.0) - quantile_reserve_db(known, 0.05)
        kept += promised <= 3.0 * -1.6449
    assert 0.935 <= kept / 2000 <= 0.965


def test_wrong_arguments_are_named() -> None:
    for share in (0.0, 1.0, -0.1, 2.0):
        with pytest.raises(UsageError, match="between 0 and 1"):
            check_quantile(share)
    with pytest.raises(InputError, match="did not measure how the PSNR differs"):
        quantile_offset_db(Compounding(), 0.05, 30.0)
    with pytest.raises(InputError, match="measured whole schedules on 1"):
        quantile_offset_db(Compounding(prompts=1), 0.05, 30.0)
