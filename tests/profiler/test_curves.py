"""Curves and compounding from numbers made up to be recognised."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridiff_compiler.ir import Compounding
from hybridiff_compiler.profiler.compounding import fit_schedules, rising_knots
from hybridiff_compiler.profiler.curves import error_curves, fill_table
from hybridiff_compiler.profiler.grid import FULL, QUICK, THINNED
from hybridiff_compiler.profiler.record import Option
from hybridiff_compiler.profiler.sensitivity import Sketches


def sketches(steps):
    """Every option's image error is its age times ten to the minus its step, exactly."""
    options = [Option("p", "memory", age) for age in (1, 3)]
    rows = [
        {o: torch.full((64, 1), o.age * 10.0 ** -step, dtype=torch.float64) for o in options if o.age <= step}
        for step in range(steps)
    ]
    return Sketches(rows, pixels=1), options


def test_ages_are_interpolated_and_early_steps_scaled():
    batch, options = sketches(5)
    (errors,) = error_curves([batch], options, (1, 3), 5)
    (curve,) = errors.curves
    assert curve.max_age == 3
    bias = curve.rmse[4][0] / 1e-4  # constant sketches do not have the spread whose bias is taken out
    assert bias == pytest.approx(1.0, abs=0.02)
    assert [v / bias for v in curve.rmse[4]] == pytest.approx([1e-4, 2e-4, 3e-4], rel=1e-4)
    assert [v / bias for v in curve.rmse[1]] == pytest.approx([1e-1, 2e-1, 3e-1], rel=1e-4)
    assert curve.rmse[0] == curve.rmse[1]


@pytest.mark.parametrize("grid", [THINNED, FULL])
def test_smooth_errors_are_found_from_part_of_the_grid(grid):
    def truth(step, age):
        return 1e-3 * math.exp(-step / 9) * age**0.9 * (1 + 20 * math.exp(-(49 - step)))

    known = {(step, age): truth(step, age) for step in range(50) for age in grid.ages_at(step, 50)}
    table = fill_table(known, 50, 8)
    misses = [
        abs(math.log(table[step, age - 1] / truth(step, age))) for step in range(1, 50) for age in range(1, 9)
        if age <= step and (step >= 8 or age in grid.ages)
    ]
    assert max(misses) < math.log(1.15)
    for (step, age), value in known.items():
        assert table[step, age - 1] == pytest.approx(value)


@given(st.integers(3, 120), st.sampled_from([THINNED, FULL, QUICK]))
def test_grid_has_the_first_step_of_every_age_and_both_ends(steps, grid):
    for age in grid.ages:
        assert steps <= age or age in grid.ages_at(age, steps)
    assert grid.ages_at(0, steps) == ()
    assert grid.ages_at(steps - 1, steps)[0] == 1
    assert all(age <= step for step in range(steps) for age in grid.ages_at(step, steps))


def curve_through(raw, measured, **fields):
    """A curve through schedules that were all solved for, and lie on the smooth one."""
    y = np.array(measured)
    return Compounding(knots=rising_knots(np.array(raw), y, y, np.ones(len(y), dtype=bool)), **fields)


def test_compounding_follows_the_schedules():
    fit = curve_through([20.0, 26.0, 32.0, 38.0], [23.0, 32.0, 38.0, 44.0], prompt_std_db=2.0, prompts=2)
    assert fit.knots == ((20.0, 23.0), (26.0, 32.0), (32.0, 38.0), (38.0, 44.0))
    assert fit.reserve_db == pytest.approx(1.645 * 2.0)
    assert fit.psnr_db(10 ** (-29 / 20)) == pytest.approx(35.0)
    assert fit.psnr_db(10 ** (-44 / 20)) == pytest.approx(50.0)
    assert fit.psnr_db(10 ** (-18 / 20)) == pytest.approx(21.0)
    assert fit.psnr_db(0) == math.inf


@given(st.lists(st.tuples(st.floats(10, 60), st.floats(5, 80)), min_size=1, max_size=12))
def test_any_measurement_gives_an_increasing_curve(points):
    fit = curve_through(*zip(*points))
    values = [fit.psnr_db(10 ** (-raw / 20)) for raw in range(5, 70)]
    assert all(b >= a for a, b in itertools.pairwise(values))


def test_what_does_not_rise_is_not_predicted_to():
    """Better schedules that turn out no better, as where the PSNR saturates."""
    raw, measured = [20.0, 25.0, 30.0, 35.0, 40.0], [30.0, 35.0, 35.5, 34.5, 35.0]
    fit = curve_through(raw, measured)
    assert [fit.psnr_db(10 ** (-value / 20)) for value in raw] == pytest.approx([30, 35, 35, 35, 35], abs=0.01)
    assert fit.psnr_db(10 ** (-41 / 20)) == pytest.approx(36.0, abs=0.01)


def test_no_schedules_no_curve():
    assert fit_schedules([]).compounding == Compounding()
    assert Compounding().psnr_db(0.01) == pytest.approx(40)
    with pytest.raises(ValueError, match="increase in both"):
        Compounding(knots=((1.0, 2.0), (2.0, 2.0)))
