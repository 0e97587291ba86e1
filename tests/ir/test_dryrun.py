"""Dry runs of schedules on their ranks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.ir import InputError, Pattern, dry_run, lower

EXACT = Pattern.parse("branch", "u0@0 c0@1 | cfg")


def pattern(table: str, stages: int = 2) -> Pattern:
    return Pattern.parse("p", table, partition="linear", stages=stages)


def test_launches_are_counted() -> None:
    pipe = pattern("u0@0(u1~) u1@1(u0~) c0@0(c1~) c1@1(c0~) | cfg")
    assert dry_run([EXACT, pipe, pipe]) == 2 + 2 + 2  # both branches of a stage are one launch


def test_what_was_never_produced_is_named() -> None:
    pipe = pattern("c0@0(c1~) c1@1(c0~) | delta")
    with pytest.raises(InputError, match=r"step 0: pattern p .* reads c1~ before any step computed it"):
        dry_run([pipe])
    with pytest.raises(InputError, match=r"step 0: pattern last: - \| last needs remembered estimates"):
        dry_run([Pattern.parse("last", "- | last"), EXACT])


def test_circles_of_waiting_are_found() -> None:
    with pytest.raises(InputError, match="wait for each other"):
        dry_run([EXACT, pattern("c0@0 c1@1 | mirror")])
    dry_run([EXACT, pattern("c0@0(c1~) c1@1 | mirror")])


@st.composite
def tables(draw: st.DrawFn) -> str:
    stages = draw(st.integers(2, 3))
    units = []
    for branch in "uc":
        for stage in range(stages):
            reads = [
                f"{draw(st.sampled_from('uc'))}{other}~" for other in range(stages)
                if other != stage and draw(st.booleans())
            ]
            units.append(f"{branch}{stage}@{draw(st.integers(0, 3))}" + (f"({','.join(reads)})" if reads else ""))
    return " ".join(units) + f" | cfg/{stages}"


@settings(deadline=None, max_examples=200)
@given(tables())
def test_whatever_can_be_ordered_runs_through(text: str) -> None:
    table, _, stages = text.partition("/")
    made = pattern(table, int(stages))
    try:
        order = lower(made)
    except InputError:
        with pytest.raises(InputError):
            dry_run([EXACT, made])
        return
    assert dry_run([EXACT, made]) == 2 + len(order)
