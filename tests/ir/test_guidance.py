"""Statistics of the discrepancy curves."""

import pytest

from hybridiff_compiler.ir import AdaptiveSchedule, Compounding, Guidance, Redundancy, ScheduleCheck

FALLING = (0.5, 0.4, 0.3, 0.25, 0.24, 0.235, 0.234, 0.2335)
RISING = tuple(0.1 + 0.05 * step for step in range(8))


def test_mean_quantiles_and_curvature():
    guidance = Guidance(rel_mae=((1.0, 2.0, 4.0), (3.0, 2.0, 0.0), (2.0, 2.0, 2.0)))
    assert guidance.mean == (2.0, 2.0, 2.0)
    assert guidance.quantile(0.0) == (1.0, 2.0, 0.0)
    assert guidance.quantile(0.25) == (1.5, 2.0, 1.0)
    assert guidance.quantile(1.0) == (3.0, 2.0, 4.0)
    assert guidance.curvature == (0.0, 0.0, 0.0)
    assert Guidance(rel_mae=((1.0, 2.0, 4.0),)).curvature == (0.0, 1.0, 0.0)


def test_tau1_is_where_the_published_rule_finds_it():
    guidance = Guidance(rel_mae=(FALLING, RISING))
    flat, rising = guidance.tau1(history=3, eps=0.01, cap=7)
    assert flat == 5
    assert rising == 7
    rule = AdaptiveSchedule(num_steps=8, warmup="a", window="b", history=3, eps=0.01, k=1, tau_cap=7, lag=1)
    assert rule.window_start(FALLING) - rule.lag == flat


def test_redundancy_and_checks():
    assert Redundancy(change={"a": (0.1, 0.3), "b": ()}).mean == {"a": pytest.approx(0.2)}
    checks = tuple(
        ScheduleCheck(kind=kind, raw_db=30, predicted_db=30, measured_db=30 + miss, std_db=1, prompts=4)
        for kind, miss in (("solved", 1.0), ("solved", -2.0), ("random", 3.0))
    )
    fit = Compounding(checks=checks)
    assert fit.mean_error_db() == 2.0
    assert fit.mean_error_db("solved") == 1.5
    assert fit.bias_db == pytest.approx(2 / 3)
    assert Compounding().bias_db is None
