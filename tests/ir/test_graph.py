"""Layer graphs, partitions and call signatures."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from hybridiff_compiler.ir import CallSignature, LayerGraph, LeafSpec, Partition, PlanMismatchError, Value

from .samples import GRAPH, NESTED, SIGNATURE


def value(**changes: object) -> Value:
    fields = {"name": "w", "producer": "a", "consumers": ("d",), "shape": (1,), "dtype": "int8", "nbytes": 1}
    return Value.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": GRAPH.layers + GRAPH.layers[:1]}, "layer names must be unique"),
        ({"output": "z"}, "output layer 'z' is not among the 4 layers"),
        ({"values": (value(), value())}, "value 'w' appears twice"),
        ({"values": (value(producer="z"),)}, "unknown producer 'z'"),
        ({"values": (value(consumers=("z",)),)}, "unknown consumer 'z'"),
        ({"values": (value(producer="d", consumers=("a",)),)}, "flows backwards from 'd' to 'a'"),
        ({"values": (value(consumers=("a",)),)}, "flows backwards"),
    ],
)
def test_bad_graphs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LayerGraph.model_validate(GRAPH.model_dump() | changes)


def test_fingerprints_see_names_values_and_shapes_only() -> None:
    other = GRAPH.layers[0].model_copy(update={"flops": 9.0, "kind": "Block"})
    same = GRAPH.model_copy(update={"layers": (other, *GRAPH.layers[1:])})
    assert same.fingerprint() == GRAPH.fingerprint()
    reshaped = GRAPH.values[0].model_copy(update={"shape": (9,)})
    assert GRAPH.model_copy(update={"values": (reshaped, *GRAPH.values[1:])}).fingerprint() != GRAPH.fingerprint()


def test_crossing_counts_a_value_once() -> None:
    assert [v.name for v in GRAPH.crossing("a", "bc")] == ["v0"]
    assert [v.name for v in NESTED.cut(GRAPH, 1, 0)] == ["v0"]
    assert [v.name for v in NESTED.cut(GRAPH, 0, 1)] == ["v2"]
    graph = GRAPH.to_networkx()
    assert graph.edges["a", "d"] == {"nbytes": 16, "values": ["v3"]}
    assert graph.number_of_edges() == 5


def test_partitions_must_cover_the_graph_and_end_with_the_output() -> None:
    NESTED.check_covers(GRAPH)
    Partition.whole(GRAPH).check_covers(GRAPH)
    assert NESTED.is_nested(GRAPH)
    assert not Partition(name="linear", stages=(("a", "b"), ("c", "d"))).is_nested(GRAPH)
    with pytest.raises(PlanMismatchError, match=r"1 layers missing \['d'\]"):
        Partition(name="p", stages=(("a", "b"), ("c",))).check_covers(GRAPH)
    with pytest.raises(PlanMismatchError, match=r"1 unknown \['z'\]"):
        Partition(name="p", stages=(("a", "b"), ("c", "d", "z"))).check_covers(GRAPH)
    with pytest.raises(PlanMismatchError, match="output layer 'd' must be in the last stage"):
        Partition(name="p", stages=(("c", "d"), ("a", "b"))).check_covers(GRAPH)


@pytest.mark.parametrize("stages", [(), ((),), (("a",), ()), (("a",), ("a",))])
def test_empty_and_overlapping_stages_are_refused(stages: tuple[tuple[str, ...], ...]) -> None:
    with pytest.raises(ValidationError):
        Partition(name="p", stages=stages)


def test_signatures_name_the_first_difference() -> None:
    assert SIGNATURE.mismatch(SIGNATURE) is None
    larger = CallSignature(leaves=(LeafSpec(path="sample", shape=(1, 4, 16, 16), dtype="float16"), SIGNATURE.leaves[1]))
    assert SIGNATURE.mismatch(larger) == "got sample: float16[1,4,16,16], expected sample: float16[1,4,8,8]"
    assert SIGNATURE.mismatch(CallSignature(leaves=SIGNATURE.leaves[:1])) == (
        "got no return_dict, expected return_dict=False"
    )
