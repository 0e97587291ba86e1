"""Pattern tables: text form, validation, exactness."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from hybridiff_compiler.ir import InputError, Pattern

from .samples import ALL, BRANCH, PAPER, REUSE, patterns


@settings(deadline=None)
@given(patterns())
def test_the_printable_form_is_exact_in_both_directions(pattern: Pattern) -> None:
    again = Pattern.parse(pattern.name, pattern.table, partition=pattern.partition, stages=pattern.stages)
    assert again == pattern
    assert again.table == pattern.table
    assert Pattern.model_validate_json(pattern.model_dump_json()) == pattern
    assert hash(again) == hash(pattern)


def test_white_space_does_not_matter() -> None:
    assert Pattern.parse("paper:nested", " u0@0(c1~)   c1@1(u0~)|mirror ", partition="nested", stages=2) == PAPER


def test_what_the_paper_table_says() -> None:
    unit = PAPER.unit("cond", 1)
    assert unit is not None
    assert unit.rank == 1
    assert str(unit.read(0)) == "u0~"
    assert PAPER.estimated_branches == ("cond",)
    assert PAPER.world_size == 2
    assert PAPER.unit("cond", 0) is None
    assert str(PAPER) == "paper:nested on nested: u0@0(c1~) c1@1(u0~) | mirror"
    assert str(BRANCH) == "branch: u0@0 c0@1 | cfg"


def test_only_complete_fresh_tables_are_exact() -> None:
    assert [p.name for p in ALL if p.is_exact] == ["single", "branch"]
    split = Pattern.parse("split", "u0@0 u1@0 c0@1 c1@1 | cfg", partition="nested", stages=2)
    crossed = Pattern.parse("crossed", "u0@0 u1@0(c0) c0@1 c1@1 | cfg", partition="nested", stages=2)
    assert split.is_exact
    assert not crossed.is_exact
    assert REUSE.world_size == 1


@pytest.mark.parametrize(
    ("table", "stages", "message"),
    [
        ("u0@0 c0@1", 1, "must end with '| COMBINE'"),
        ("u0@0 c0@1 | magic", 1, "one of cfg, mirror, delta, last"),
        ("x0@0 | mirror", 1, "unit 'x0@0' is not of the form"),
        ("u0 | mirror", 1, "unit 'u0' is not of the form"),
        ("u0@0(q1) u1@0 | mirror", 2, "read 'q1' of unit"),
        ("u0@0 u0@1 | mirror", 1, "computes unit u0@1 twice"),
        ("u1@0 | mirror", 1, "outside its 1 stages"),
        ("u0@0(u5~) u1@0 | mirror", 2, "reads stage 5"),
        ("u0@0(u0~) u1@0 | mirror", 2, "reads stage 0"),
        ("u0@0(u1) u1@0 | mirror", 2, "lists a default"),
        ("u0@0(u1~,c1~) u1@0 | mirror", 2, "each read stage once"),
        ("u1@0 | mirror", 2, "reads u0 fresh, which no unit computes"),
        ("u0@0 | cfg", 1, "needs 2 computed estimates, got 1"),
        ("u0@0 c0@0 | delta", 1, "needs 1 computed estimates, got 2"),
        ("u0@0 | last", 1, "needs 0 computed estimates, got 1"),
    ],
)
def test_bad_tables_are_refused(table: str, stages: int, message: str) -> None:
    with pytest.raises(InputError) as error:
        Pattern.parse("p", table, partition="split" if stages > 1 else "whole", stages=stages)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["", "a b", "a*2", "a|b"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        Pattern.parse(name, "u0@0 c0@0 | cfg")
