"""Schedules: run-length text, and the adaptive rule against a literal transcription of METHOD.md."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hybridiff_compiler.ir import (
    AdaptiveSchedule,
    FixedSchedule,
    InputError,
    SwitchedSchedule,
    format_steps,
    parse_steps,
)

names = st.from_regex(r"[a-z][a-z0-9.:@+-]{0,5}", fullmatch=True)


@settings(deadline=None)
@given(st.lists(names, max_size=4).flatmap(lambda pool: st.lists(st.sampled_from(pool or ["x"]), max_size=30)))
def test_run_length_form_round_trips(steps: list[str]) -> None:
    text = format_steps(tuple(steps))
    assert parse_steps(text) == tuple(steps)
    if steps:
        assert str(FixedSchedule(steps=tuple(steps))) == text


def test_run_length_form() -> None:
    assert format_steps(("branch",) * 3 + ("paper:nested",) + ("branch",) * 2) == "branch*3 paper:nested branch*2"
    assert parse_steps("a a*2  b") == ("a", "a", "a", "b")


@pytest.mark.parametrize("text", ["a*0", "a*", "*3", "a*-1", "a*1.5", "a|b", "a*2*3", "é*"])
def test_bad_words_are_named(text: str) -> None:
    with pytest.raises(InputError, match="is not of the form NAME or NAME"):
        parse_steps(text)


def literal_start(m: list[float], history: int, eps: float, cap: int, lag: int) -> int:
    """METHOD.md, "Switching rule", acted on `lag` steps after it fires, but never later than the cap."""
    for i in range(cap):  # after step i; "if none is found by step tau_cap - 1"
        known = m[: i + 1]
        if len(known) > history:
            slope = (known[i - history + 1] - known[i]) / history
            if 0 <= slope < eps:
                return min(i + lag, cap)
    return cap


def adaptive(num_steps: int = 40, **changes: object) -> AdaptiveSchedule:
    fields: dict[str, object] = {
        "num_steps": num_steps, "warmup": "branch", "window": "paper", "history": 3, "eps": 0.1, "k": 4, "tau_cap": 12,
    }
    return AdaptiveSchedule.model_validate(fields | changes)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.integers(-10, 10).map(lambda n: n / 10), min_size=20, max_size=20), st.integers(1, 8),
    st.sampled_from([0.01, 0.05, 0.2]), st.integers(1, 16), st.integers(1, 4),
)
def test_the_window_starts_where_the_rule_says(m: list[float], history: int, eps: float, cap: int, lag: int) -> None:
    rule = adaptive(20, history=history, eps=eps, tau_cap=cap, lag=lag)
    start = literal_start(m, history, eps, cap, lag)
    assert rule.window_start(m) == start
    steps = rule.resolve(m).steps
    assert steps == ("branch",) * start + ("paper",) * 4 + ("branch",) * (16 - start)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-10, 10).map(lambda n: n / 10), min_size=20, max_size=20), st.integers(1, 8),
    st.integers(1, 16), st.integers(1, 4),
)
def test_it_is_known_online_in_time_and_never_changes(m: list[float], history: int, cap: int, lag: int) -> None:
    rule = adaptive(20, history=history, tau_cap=cap, lag=lag)
    final = rule.window_start(m)
    assert final is not None
    for step in range(20):
        # When step `step` begins, values up to m[step - lag] have arrived.
        seen = rule.window_start(m[: max(0, step - lag + 1)])
        assert seen in (None, final)
        if step >= final:
            assert seen == final


def test_the_cap_fires_without_measurements() -> None:
    rule = adaptive()
    assert rule.resolve([]).steps.index("paper") == 12
    assert rule.window_start([]) is None
    assert rule.patterns == ("branch", "paper")
    assert str(rule) == "adaptive branch -> paper*4 -> branch (L=3 eps=0.1 cap=12, 40 steps)"


def test_a_rising_curve_is_not_flat() -> None:
    assert adaptive().window_start([0.1 * i for i in range(40)]) == 12
    assert adaptive().window_start([1.0] * 40) == 5


@pytest.mark.parametrize(
    "changes", [{"tau_cap": 37}, {"k": 29}, {"history": 0}, {"eps": 0.0}, {"tau_cap": 0}, {"lag": 0}, {"k": -1}]
)
def test_bad_constants_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        adaptive(**changes)


def test_the_rule_lists_what_it_can_decide() -> None:
    rule = adaptive(20, history=3, tau_cap=12)
    starts = [choice.steps.index("paper") for choice in rule.possible()]
    assert starts == list(range(5, 13))
    assert rule.undecided.steps == ("branch",) * 20
    assert adaptive(20, history=30, tau_cap=12).possible() == (rule.resolve([]),)
    assert FixedSchedule(steps=("a",)).possible() == (FixedSchedule(steps=("a",)),)


def switched(**changes: object) -> SwitchedSchedule:
    fields: dict[str, object] = {
        "choices": [{"steps": ["b"] * 4 + ["r"]}, {"steps": ["b"] * 5}], "thresholds": [0.5], "measured": 3,
    }
    return SwitchedSchedule.model_validate(fields | changes)


def test_switched_by_the_first_discrepancies() -> None:
    rule = switched()
    assert (rule.num_steps, rule.decided_at, rule.patterns) == (5, 4, ("b", "r"))
    assert rule.resolve([0.1, 0.1, 0.1, 9.0]) == rule.choices[0]
    assert rule.resolve([0.5, 0.5, 0.5]) == rule.choices[1]
    assert rule.resolve([0.1]) == rule.choices[1]
    assert rule.decide([0.1, 0.1], 4) is None
    assert rule.possible() == rule.choices
    assert str(rule) == "switched by mean rel-MAE of 3 steps: < 0.5: b*4 r; else: b*5"
    assert switched(statistic="slope").value([1.0, 2.0, 5.0]) == 2.0
    assert SwitchedSchedule.model_validate_json(rule.model_dump_json()) == rule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": []}, "2 choices need 1 thresholds, got 0"),
        ({"choices": [{"steps": ["b"]}] * 3, "thresholds": [0.5, 0.5], "measured": 1}, "must increase strictly"),
        ({"choices": [{"steps": ["b"] * 4}, {"steps": ["b"] * 5}]}, "equally many steps"),
        ({"measured": 4}, "must agree on steps 0 to 4"),
        ({"measured": 6}, "6 measured steps exceed the 5 steps"),
        ({"lag": 3}, "must agree on steps 0 to 4"),
        ({"measured": 1, "statistic": "slope"}, "needs 2 measured steps"),
    ],
)
def test_bad_switches_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        switched(**changes)
