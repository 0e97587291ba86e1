"""What tables lose to staleness, and how that is held against measured errors."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from hybridiff_compiler.ir import Partition, Pattern, Redundancy
from hybridiff_compiler.planner import linear, nested
from hybridiff_compiler.planner.staleness import StaleTable, lost_bytes, rank_errors, stale_tables, stale_values

from .graphs import graph_of
from .profiles import make_profile

GRAPH = graph_of(4, [(0, (1, 3), 10), (1, (2,), 4), (2, (3,), 6)])
NESTED = Partition(name="nested", stages=(("l1", "l2"), ("l0", "l3")))
LINEAR = Partition(name="linear", stages=(("l0", "l1"), ("l2", "l3")))


@pytest.mark.parametrize(("partition", "table", "names"), [
    (NESTED, "u0@0(u1~) u1@0(u0~) c0@1(c1~) c1@1(c0~) | cfg", ["v2"]),  # what the inner stage reads makes no estimate
    (NESTED, "u1@0(u0~) c1@1(c0~) | cfg", ["v2"]),
    (LINEAR, "u0@0(c1~) c1@1(u0~) | mirror", ["v0", "v1"]),
    (LINEAR, "u0@0 u1@0 c0@1 c1@1 | cfg", []),  # all fresh
])
def test_what_an_estimate_reads_stale(partition: Partition, table: str, names: list[str]) -> None:
    pattern = Pattern.parse("p", table, partition=partition.name, stages=2)
    values = stale_values(GRAPH, partition, pattern)
    assert sorted(value.name for value in values) == names
    change = {"v0": 0.5, "v1": 0.25, "v2": 0.125}
    assert lost_bytes(values, change) == sum(value.nbytes * change[value.name] for value in values)
    assert lost_bytes(values, {}) == (None if names else 0)


def test_tables_of_a_profile() -> None:
    profile = make_profile(num_steps=6)
    assert stale_tables(profile) == []  # nothing is known of changes
    change = {value.name: (0.1,) * 5 for value in profile.graph.values}
    tables = stale_tables(profile.model_copy(update={"redundancy": Redundancy(change=change)}))
    families = {table.family for table in tables}
    assert {"branch-reuse", "cond-pipe"} <= families
    assert not {"paper", "cond-pipe-unguided", "reuse", "branch"} & families
    by_name = {table.pattern: table for table in tables}
    assert by_name["cond-pipe:linear"].lost_bytes > by_name["cond-pipe:nested"].lost_bytes > 0
    assert by_name["cond-pipe:linear"].error_db > by_name["cond-pipe:nested"].error_db


def test_only_distinct_pairs_of_a_family_count() -> None:
    def table(family: str, lost: float, error: float) -> StaleTable:
        return StaleTable(pattern=f"{family}:p", family=family, lost_bytes=lost, error_db=error)

    a, b, c = table("pipe", 1, -70), table("pipe", 2, -60), table("pipe", 3, -65)
    found = rank_errors([a, b, c, table("pipe", 3, -80), table("branch-reuse", 9, -90)])
    # a-b and a-c agree; b-c and each with the steadier fourth do not; c and the fourth lose equally much.
    assert (found.pairs, found.agreeing) == (5, 2)
    assert rank_errors([a, table("pipe", 5, -70.05)]).pairs == 0


def test_the_check_looks_at_every_cut_the_partitioner_may_take() -> None:
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "check_redundancy.py"))
    profile = make_profile(num_steps=4)
    seconds, names = profile.costs.layers[1], profile.graph.names
    for k in range(3):
        change = {value.name: 0.01 * (1 + (k + n) % 3) for n, value in enumerate(profile.graph.values)}
        cut = nested(profile.graph, seconds, slack=0.05, change=change)
        assert cut.stages in {each.stages for each in tool["nested_cuts"](profile, 0.05)}
    assert linear(profile.graph, seconds).stages in {each.stages for each in tool["linear_cuts"](profile, 0.05)}
    cuts = tool["nested_cuts"](profile, 0.05)
    slower = [max(sum(seconds[names.index(name)] for name in stage) for stage in cut.stages) for cut in cuts]
    assert max(slower) <= 1.05 * min(slower)
