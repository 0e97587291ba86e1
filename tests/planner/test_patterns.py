"""The generated tables."""

from __future__ import annotations

import pytest

from hybridiff_compiler.ir import Pattern, UsageError, lower
from hybridiff_compiler.planner import candidate_partitions, exact_patterns, family_of, generate_patterns, on_ranks

from .graphs import unet_like

PARTITIONS = candidate_partitions(unet_like(10), [1.0] * 22)

TABLES = """\
single: u0@0 c0@0 | cfg
branch: u0@0 c0@1 | cfg
paper:linear on linear: u0@0(c1~) c1@1(u0~) | mirror
paper:nested on nested: u0@0(c1~) c1@1(u0~) | mirror
cond-pipe:linear on linear: c0@0(c1~) c1@1(c0~) | delta
cond-pipe:nested on nested: c0@0(c1~) c1@1(c0~) | delta
cond-pipe-unguided:linear on linear: c0@0(c1~) c1@1(c0~) | mirror
cond-pipe-unguided:nested on nested: c0@0(c1~) c1@1(c0~) | mirror
branch-reuse:nested on nested: u1@0(u0~) c1@1(c0~) | cfg
branch-reuse:thin on thin: u1@0(u0~) c1@1(c0~) | cfg
reuse: - | last"""


def test_the_tables_for_two_ranks() -> None:
    patterns = generate_patterns(PARTITIONS, 2)
    assert "\n".join(map(str, patterns)) == TABLES
    assert [p.name for p in patterns if p.is_exact] == ["single", "branch"]
    for pattern in patterns:
        lower(pattern)


def test_one_rank_gets_the_same_tables_on_rank_zero() -> None:
    two, one = generate_patterns(PARTITIONS, 2), generate_patterns(PARTITIONS, 1)
    assert [p.name for p in one] == [p.name for p in two if p.name != "branch"]
    assert all(p.world_size == 1 for p in one)
    by_name = {p.name: p for p in two}
    for pattern in one:
        assert pattern.table == by_name[pattern.name].table.replace("@1", "@0")


def test_exact_patterns() -> None:
    assert [p.name for p in exact_patterns(2)] == ["single", "branch"]
    assert [p.name for p in exact_patterns(1)] == ["single"]


def test_partitions_of_other_names_are_passed_over() -> None:
    other = PARTITIONS[0].model_copy(update={"name": "mine"})
    assert {p.partition for p in generate_patterns((other,), 2)} == {"whole"}


@pytest.mark.parametrize("gpus", [-1, 0, 3])
def test_other_numbers_of_gpus_are_refused(gpus: int) -> None:
    with pytest.raises(UsageError, match=f"got {gpus} GPUs; this planner makes tables for 1 or 2 ranks"):
        generate_patterns(PARTITIONS, gpus)


def test_folding_keeps_neighbours_together() -> None:
    four = Pattern.parse("pipe", "u0@0(u1~) u1@1(u0~) c0@2(c1~) c1@3(c0~) | cfg", partition="linear", stages=2)
    assert on_ranks(four, 2).table == "u0@0(u1~) u1@0(u0~) c0@1(c1~) c1@1(c0~) | cfg"
    assert on_ranks(four, 4) is four
    assert on_ranks(four, 8) is four
    assert family_of("paper:nested") == "paper"
    assert family_of("reuse") == "reuse"
