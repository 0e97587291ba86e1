"""Ages of what patterns take from earlier steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.ir import NEVER, AgeModel, InputError, Pattern, check_reads

from .samples import ALL, BRANCH, BRANCH_REUSE, COND_PIPE, PAPER, REUSE

MODEL = AgeModel.of(ALL)
UNGUIDED = Pattern.parse("unguided", "c0@0 | mirror")


def after(*steps: Pattern):
    ages = MODEL.start
    for pattern in steps:
        ages = MODEL.advance(ages, pattern)
    return ages


def test_slots_are_what_is_read_stale() -> None:
    assert set(MODEL.slots) == {("nested", "cond", 1), ("nested", "uncond", 0), ("nested", "cond", 0)}
    assert MODEL.start == (NEVER,) * 4
    assert AgeModel.of([BRANCH]).slots == ()


def test_an_exact_step_renews_everything() -> None:
    assert after(BRANCH) == (1, 1, 1, 1)
    assert after(BRANCH, REUSE, BRANCH) == (1, 1, 1, 1)


def test_cheap_steps_renew_what_they_compute_and_nothing_remembered() -> None:
    ages = after(BRANCH, BRANCH_REUSE, BRANCH_REUSE)
    assert MODEL.activation_age(ages, BRANCH_REUSE) == 3
    assert MODEL.memory_age(ages, REUSE) == 3
    assert MODEL.activation_age(ages, PAPER) == 3  # the unconditional inner stage is that old, the outer one is fresh
    ages = after(BRANCH, COND_PIPE, COND_PIPE)
    assert MODEL.activation_age(ages, COND_PIPE) == 1
    assert MODEL.memory_age(ages, COND_PIPE) == 3
    assert MODEL.memory_age(ages, PAPER) == 0
    assert MODEL.activation_age(ages, REUSE) == 0


def test_ages_stop_at_the_cap_and_never_stays_never() -> None:
    ages = MODEL.start
    assert MODEL.advance(ages, REUSE, cap=3) == (NEVER,) * 4
    ages = MODEL.advance(ages, BRANCH, cap=3)
    for _ in range(5):
        ages = MODEL.advance(ages, REUSE, cap=3)
    assert ages == (3, 3, 3, 3)


@settings(deadline=None)
@given(st.lists(st.sampled_from(ALL), max_size=12))
def test_ages_match_a_literal_log(steps: list[Pattern]) -> None:
    written: dict[object, int] = {}
    for index, pattern in enumerate(steps):
        if pattern.is_exact:
            written.update(dict.fromkeys((*MODEL.slots, "memory"), index))
        for unit in pattern.units:
            written[pattern.partition, unit.branch, unit.stage] = index
    ages = after(*steps)
    expected = [len(steps) - written[key] if key in written else NEVER for key in ("memory", *MODEL.slots)]
    assert list(ages) == expected


@settings(deadline=None)
@given(st.lists(st.sampled_from((*ALL, UNGUIDED)), max_size=8))
def test_the_dry_run_agrees_with_the_ages_once_a_step_was_exact(steps: list[Pattern]) -> None:
    steps = [BRANCH, *steps]
    check_reads(steps)
    for index, pattern in enumerate(steps[1:], start=1):
        assert MODEL.activation_age(after(*steps[:index]), pattern) < NEVER


TREND = Pattern.parse("trend", "- | last+0.5")


@settings(deadline=None)
@given(st.lists(st.sampled_from((BRANCH, BRANCH_REUSE, REUSE)), max_size=12))
def test_the_gap_is_the_distance_of_the_last_two_exact_steps(steps: list[Pattern]) -> None:
    model = AgeModel.of((*ALL, TREND))
    ages = model.start
    for pattern in steps:
        ages = model.advance(ages, pattern)
    exact = [index for index, pattern in enumerate(steps) if pattern is BRANCH]
    assert model.gap(ages, TREND) == (exact[-1] - exact[-2] if len(exact) > 1 else NEVER)
    assert model.gap(ages, REUSE) == 0
    assert model.memory_age(ages, TREND) == (len(steps) - exact[-1] if exact else NEVER)
    assert ages[: len(MODEL.start)] == after(*steps)


def test_a_trend_needs_two_exact_steps() -> None:
    check_reads([BRANCH, REUSE, BRANCH, TREND])
    with pytest.raises(InputError, match=r"step 2: pattern trend.* extrapolates from two exact steps, but 1 came"):
        check_reads([BRANCH, REUSE, TREND])


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([PAPER], "step 0: pattern paper:nested .* reads c1~ before any step computed it"),
        ([UNGUIDED, REUSE], "step 1: pattern reuse.* needs remembered estimates"),
        ([REUSE], "step 0"),
        ([UNGUIDED, COND_PIPE], "step 1: pattern cond-pipe:nested.* reads c1~"),
    ],
)
def test_the_dry_run_names_what_is_read_too_early(steps: list[Pattern], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_reads(steps)
