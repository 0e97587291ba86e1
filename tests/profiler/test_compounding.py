"""Weights, curve and cross-validation from schedules whose PSNR follows a known law."""

import itertools
import math

import numpy as np
import pytest

from hybridiff_compiler.ir import Compounding
from hybridiff_compiler.profiler.batches import block_borders
from hybridiff_compiler.profiler.compounding import MeasuredSchedule, fit_schedules

TRUE = {"cfg/activations": 1.0, "mirror/activations": 0.5, "last/memory": 2.0}


def schedules(count=24, noise=0.0, prompts=6, offset=0.0, seed=0):
    """PSNR = 6 + 0.9 raw, raw from the truly weighted errors; the second block of prompts is harder."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        shares = rng.dirichlet(np.ones(len(TRUE)))
        level = 10 ** (-rng.uniform(20, 45) / 20)
        errors = {group: level * share for group, share in zip(TRUE, shares)}
        raw = -20 * math.log10(sum(TRUE[group] * value for group, value in errors.items()))
        block = number % 2
        values = 6 + 0.9 * raw - offset * block + noise * rng.standard_normal(prompts)
        made.append(MeasuredSchedule(errors, tuple(values), block, "solved" if number < count // 2 else "random"))
    return made


def test_weights_are_found_up_to_a_common_factor():
    fit = fit_schedules(schedules(40))
    ratio = fit.weights["last/memory"] / fit.weights["mirror/activations"]
    assert 1.7 < ratio < 5.0
    assert fit.compounding.residual_db < 0.8
    assert fit.compounding.mean_error_db() < 1.2


def test_harder_prompts_of_one_block_do_not_disturb_the_curve():
    easy, mixed = fit_schedules(schedules(40)), fit_schedules(schedules(40, offset=4.0))
    error = 10 ** (-30 / 20)
    assert mixed.compounding.psnr_db(error) == pytest.approx(easy.compounding.psnr_db(error) - 2.0, abs=0.7)
    assert mixed.compounding.prompts == 12
    # a fit to one block does not know of the other: the cross-validation must say so
    assert mixed.compounding.mean_error_db() > 3.0


def test_checks_are_kept_apart_by_kind():
    compounding = fit_schedules(schedules(20, noise=1.0)).compounding
    assert [check.kind for check in compounding.checks] == ["solved"] * 10 + ["random"] * 10
    assert compounding.mean_error_db("solved") >= 0
    assert compounding.mean_error_db("unheard of") is None
    assert abs(compounding.bias_db) < 2
    assert compounding.prompt_std_db == pytest.approx(1.0, rel=0.3)


def test_one_block_alone_has_a_curve_and_no_checks():
    fit = fit_schedules([each for each in schedules(20) if each.block == 0])
    assert fit.compounding.knots
    assert fit.compounding.checks == ()
    assert fit.compounding.mean_error_db() is None


@pytest.mark.parametrize("prompts", [1, 2, 3, 4, 5, 12, 25, 32, 100])
def test_no_block_has_a_single_prompt(prompts):
    sizes = [end - begin for begin, end in itertools.pairwise(block_borders(prompts))]
    assert sum(sizes) == prompts
    assert min(sizes) >= min(2, prompts)
    assert len(sizes) >= 2 or prompts < 4


def test_a_block_of_one_prompt_says_nothing_about_their_spread():
    some = schedules(20, noise=2.0)
    lonely = [MeasuredSchedule(e.errors, e.psnr_db[: 1 if e.block else 6], e.block, e.kind) for e in some]
    assert fit_schedules(lonely).compounding.prompt_std_db > 1.2


def test_nothing_measured_nothing_learnt():
    fit = fit_schedules([])
    assert (fit.weights, fit.compounding) == ({}, Compounding())
    with pytest.raises(ValueError, match="exact schedules"):
        fit_schedules([MeasuredSchedule({}, (40.0,), 0, "solved")])
