"""The generated tables."""

from __future__ import annotations

import pytest

from hybridiff_compiler.ir import Pattern, UsageError, dry_run, lower
from hybridiff_compiler.planner import (
    candidate_partitions,
    exact_patterns,
    family_of,
    generate_patterns,
    measured_patterns,
    on_ranks,
    placements,
    rank_free,
    stage_counts,
)

from .graphs import unet_like

PARTITIONS = candidate_partitions(unet_like(10), [1.0] * 22)
MANY = candidate_partitions(unet_like(10), [1.0] * 22, (1, 2, 4))

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
reuse: - | last
half-trend: - | last+0.5
trend: - | last+1"""


def test_the_tables_for_two_ranks() -> None:
    patterns = generate_patterns(PARTITIONS, 2)
    assert "\n".join(map(str, patterns)) == TABLES
    assert [p.name for p in patterns if p.is_exact] == ["single", "branch"]
    for pattern in patterns:
        lower(pattern)


ONE_RANK = """\
single: u0@0 c0@0 | cfg
cond-delta: c0@0 | delta
cond-only: c0@0 | mirror
branch-reuse:nested on nested: u1@0(u0~) c1@0(c0~) | cfg
branch-reuse:thin on thin: u1@0(u0~) c1@0(c0~) | cfg
cond-reuse:nested on nested: c1@0(c0~) | delta
cond-reuse:thin on thin: c1@0(c0~) | delta
reuse: - | last
half-trend: - | last+0.5
trend: - | last+1"""


def test_one_rank_leaves_out_branches_and_stages_instead_of_dividing_them() -> None:
    assert "\n".join(map(str, generate_patterns(PARTITIONS, 1))) == ONE_RANK


FOUR_RANKS = """\
branch: u0@0 c0@1 | cfg
pipe:nested on nested: u0@0(u1~) u1@1(u0~) c0@2(c1~) c1@3(c0~) | cfg
paper:nested4 on nested4: u0@0(u1~,c2~,c3~) u1@1(u0~,c2~,c3~) c2@2(u0~,u1~,c3~) c3@3(u0~,u1~,c2~) | mirror
cond-pipe:linear4 on linear4: c0@0(c1~,c2~,c3~) c1@1(c0~,c2~,c3~) c2@2(c0~,c1~,c3~) c3@3(c0~,c1~,c2~) | delta
branch-reuse:nested4+2 on nested4: u2@0(u0~,u1~,u3~) u3@1(u0~,u1~,u2~) c2@2(c0~,c1~,c3~) c3@3(c0~,c1~,c2~) | cfg
branch-reuse:thin on thin: u1@0(u0~) c1@1(c0~) | cfg"""


def test_four_ranks_get_pipelines_of_four_stages_and_of_two_per_branch() -> None:
    tables = {str(pattern) for pattern in generate_patterns(MANY, 4)}
    assert not set(FOUR_RANKS.splitlines()) - tables
    # Both branches through two stages take as long as one branch would, and as both through four would.
    assert not {"cond-pipe:linear", "paper:linear", "pipe:linear4"} & {table.split(" ")[0] for table in tables}


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 5, 6, 8, 16, 64])
def test_every_table_is_valid_for_its_ranks(gpus: int) -> None:
    graph = unet_like(40)
    partitions = candidate_partitions(graph, [1.0] * len(graph.layers), gpus)
    patterns = generate_patterns(partitions, gpus)
    exact = next(p for p in patterns if p.is_exact)
    assert len({p.name for p in patterns}) == len(patterns)
    assert max(p.world_size for p in patterns) == gpus
    for pattern in patterns:
        dry_run([exact, exact, pattern, pattern])
        assert Pattern.parse(pattern.name, pattern.table, partition=pattern.partition, stages=pattern.stages) == pattern
        for placed in placements(pattern, gpus):
            assert placed.world_size <= gpus
            assert rank_free(placed) == rank_free(pattern)


def test_equal_names_mean_equal_tables_up_to_ranks() -> None:
    tables: dict[str, set[str]] = {}
    names: dict[str, set[str]] = {}
    for gpus in (1, 2, 3, 4, 6, 8):
        for pattern in generate_patterns(MANY, gpus):
            if not pattern.is_exact:
                tables.setdefault(pattern.name, set()).add(rank_free(pattern))
                names.setdefault(rank_free(pattern), set()).add(pattern.name)
    assert all(len(found) == 1 for found in (*tables.values(), *names.values()))


def test_a_profile_measures_every_table_of_its_worlds_once() -> None:
    measured = measured_patterns(MANY, (1, 2, 4))
    assert len({p.name for p in measured}) == len(measured)
    assert [p.name for p in measured if p.is_exact] == ["single", "branch"]
    assert max(p.world_size for p in measured) == 2
    assert sum(not p.is_exact for p in measured) < 26
    wanted = {rank_free(p) for gpus in (1, 2, 4) for p in generate_patterns(MANY, gpus)}
    assert {rank_free(p) for p in measured} == wanted
    assert {p.name for p in measured} - {p.name for p in measured_patterns(MANY, (1, 2, 4), trends=False)} == {
        "trend", "half-trend"
    }


def test_stage_counts_halve() -> None:
    assert [stage_counts(gpus) for gpus in (1, 2, 3, 4, 5, 8)] == [
        (), (2,), (2, 3), (2, 4), (2, 3, 5), (2, 4, 8)
    ]


def test_exact_patterns() -> None:
    assert [p.name for p in exact_patterns(2)] == ["single", "branch"]
    assert [p.name for p in exact_patterns(1)] == ["single"]


def test_partitions_of_other_names_are_passed_over() -> None:
    other = PARTITIONS[0].model_copy(update={"name": "mine"})
    assert {p.partition for p in generate_patterns((other,), 2)} == {"whole"}


@pytest.mark.parametrize("gpus", [-1, 0, 65])
def test_other_numbers_of_gpus_are_refused(gpus: int) -> None:
    with pytest.raises(UsageError, match=f"got {gpus} GPUs; patterns are generated for 1 to 64 ranks"):
        generate_patterns(PARTITIONS, gpus)


def test_folding_keeps_neighbours_together() -> None:
    four = Pattern.parse("pipe", "u0@0(u1~) u1@1(u0~) c0@2(c1~) c1@3(c0~) | cfg", partition="linear", stages=2)
    assert on_ranks(four, 2).table == "u0@0(u1~) u1@0(u0~) c0@1(c1~) c1@1(c0~) | cfg"
    assert on_ranks(four, 4) is four
    assert on_ranks(four, 8) is four
    assert family_of("paper:nested") == "paper"
    assert family_of("reuse") == "reuse"
