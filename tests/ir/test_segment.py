"""Lowering of tables to segments, by hand, and what holds for every table."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from hybridiff_compiler.ir import InputError, Pattern, dry_run, lower

from .samples import ALL, patterns


def text(pattern: Pattern) -> list[str]:
    return [str(segment) for segment in lower(pattern)]


def split(table: str, stages: int = 2) -> Pattern:
    return Pattern.parse("p", table, partition="split", stages=stages)


def test_the_known_tables() -> None:
    assert {p.name: text(p) for p in ALL} == {
        "single": ["uc[0]@0"],
        "branch": ["u[0]@0", "c[0]@1"],
        "paper:nested": ["u[0]@0", "c[1]@1"],
        "cond-pipe:nested": ["c[0]@0", "c[1]@1"],
        "branch-reuse:nested": ["u[1]@0", "c[1]@1"],
        "reuse": [],
    }


def test_fresh_stages_of_one_rank_are_one_graph() -> None:
    assert text(split("u0@0 u1@0 c0@1 c1@1 | cfg")) == ["u[0,1]@0", "c[0,1]@1"]
    assert text(split("u0@0 u1@0 c0@0 c1@0 | cfg")) == ["uc[0,1]@0"]


def test_a_stale_edge_is_a_cut() -> None:
    assert text(split("c0@0(c1~) c1@0 | mirror")) == ["c[0]@0", "c[1]@0"]
    assert text(split("c0@0 c1@0(c0~) | mirror")) == ["c[1]@0", "c[0]@0"]


def test_fresh_reads_across_ranks_order_the_segments() -> None:
    segments = lower(split("c1@1 c0@0(c1~) | mirror"))
    assert [str(s) for s in segments] == ["c[0]@0", "c[1]@1"]
    assert str(segments[1].read("cond", 0)) == "c0"
    assert segments[1].has_estimate
    assert not segments[0].has_estimate


def test_branches_are_batched_when_nothing_fresh_comes_in() -> None:
    segments = lower(split("u1@0(u0~) c1@0(c0~) | cfg"))
    assert [str(s) for s in segments] == ["uc[1]@0"]
    assert [str(r) for reads in segments[0].reads for r in reads] == ["u0~", "c0~"]
    assert text(split("u0@1(u1~) c0@1(c1~) u1@0 c1@0 | cfg")) == ["uc[0]@1", "u[1]@0", "c[1]@0"]


def test_circles_of_fresh_reads_are_refused() -> None:
    with pytest.raises(InputError, match="wait for each other in a circle; mark at least one of them stale"):
        lower(split("c0@0 c1@1 | mirror"))


def test_fused_units_must_read_alike() -> None:
    with pytest.raises(InputError, match="read stage 2 in two ways"):
        lower(split("c0@0(c2~) c1@0(u2~) c2@1(c0~,c1~) | mirror", stages=3))


@settings(max_examples=300, deadline=None)
@given(patterns())
def test_every_unit_runs_once_after_its_fresh_reads(pattern: Pattern) -> None:
    try:
        segments = lower(pattern)
    except InputError:
        return
    done: set[tuple[str, int]] = set()
    for segment in segments:
        for branch in segment.branches:
            for stage in segment.stages:
                unit = pattern.unit(branch, stage)
                assert unit is not None
                assert unit.rank == segment.rank
                for other in set(range(pattern.stages)) - set(segment.stages):
                    read = unit.read(other)
                    assert segment.read(branch, other) == read
                    assert read.stale or (read.branch, other) in done
        for branch in segment.branches:
            assert not done & {(branch, stage) for stage in segment.stages}
        done |= {(branch, stage) for branch in segment.branches for stage in segment.stages}
    assert done == {(unit.branch, unit.stage) for unit in pattern.units}


def test_reads_of_nothing_order_nothing() -> None:
    relay = split("u0@0(u1-) c0@0(c1-) u1@1 c1@1 | cfg")
    assert text(relay) == ["u[0]@0", "c[0]@0", "u[1]@1", "c[1]@1"]
    assert relay.is_exact
    assert not split("u0@0(u1~) c0@0(c1~) u1@1 c1@1 | cfg").is_exact
    assert dry_run([relay, relay]) == 8
    assert Pattern.parse("p", relay.table, partition="split", stages=2) == relay
    assert Pattern.model_validate_json(relay.model_dump_json()) == relay
    assert "nothing" not in split("u0@0(u1~) c0@0(c1~) u1@1 c1@1 | cfg").model_dump_json()
