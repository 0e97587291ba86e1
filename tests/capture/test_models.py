"""What must hold for every denoiser: conserved, acyclic, bit-exact whole and in stages."""

from itertools import pairwise

import networkx as nx
import pytest
import torch

from hybridiff_compiler.ir.partition import Partition

MODELS = ["unet", "sd3", "pixart", "flux", "wan"]


@pytest.fixture(params=MODELS)
def case(request, make_case):
    return make_case(request.param)


def stages_of(captured, count):
    """`count` contiguous stages with the values that other stages read as taps."""
    names = captured.layers.names
    bounds = [len(names) * k // count for k in range(count + 1)]
    parts = [names[a:b] for a, b in pairwise(bounds)]
    partition = Partition(name="contiguous", stages=tuple(parts))
    partition.check_covers(captured.layers)
    rest = [[n for n in names if n not in part] for part in parts]
    return [
        captured.extract(part, [v.name for v in captured.layers.crossing(part, others)])
        for part, others in zip(parts, rest)
    ]


def test_layer_graph_is_acyclic_with_one_sink(case):
    graph = case.captured.layers.to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    assert [name for name in graph if not graph.out_degree(name)] == [case.captured.layers.output]
    assert case.captured.layers.output == case.captured.layers.names[-1]


def test_every_operation_is_in_exactly_one_layer(case):
    calls = [node.name for node in case.captured.graph_module.graph.nodes if node.op == "call_function"]
    assert sorted(calls) == sorted(case.captured.layer_of)
    assert set(case.captured.layer_of.values()) == set(case.captured.layers.names)


def test_parameters_are_conserved_and_shared(case):
    mine = {id(p) for p in case.captured.graph_module.parameters()}
    unused = {name for name, p in case.denoiser.named_parameters() if id(p) not in mine}
    assert not unused
    assert len(mine) == len({id(p) for p in case.denoiser.parameters()})
    total = sum(layer.parameter_bytes for layer in case.captured.layers.layers)
    assert total >= sum(p.numel() * p.element_size() for p in case.denoiser.parameters())


def test_whole_graph_is_bit_exact(case):
    (estimate,) = case.run(case.captured.whole(), {})
    assert torch.equal(estimate, case.estimate)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("copy", [True, False], ids=["transferred", "in-process"])
def test_stages_in_sequence_are_bit_exact(case, count, copy):
    values, stages = {}, stages_of(case.captured, count)
    for stage in stages:
        outputs = case.run(stage, values, copy=copy)
        values.update(zip(stage.values_out, outputs[stage.has_estimate :]))
    assert [stage.has_estimate for stage in stages] == [False] * (count - 1) + [True]
    assert torch.equal(outputs[0], case.estimate)


def test_stages_share_the_parameters_between_them(case):
    stages = stages_of(case.captured, 3)
    held = [{id(p) for p in stage.module.parameters()} for stage in stages]
    assert set.union(*held) == {id(p) for p in case.denoiser.parameters()}
    assert all(len(part) < len(set.union(*held)) for part in held)


def test_every_layer_alone_is_bit_exact(case):
    """Every layer as a stage of its own, on exact inputs, returns exactly what the whole denoiser computes."""
    graph = case.captured.layers
    for name in graph.names:
        stage = case.captured.extract([name], [v.name for v in graph.values if v.producer == name])
        outputs = case.run(stage, case.values)
        assert stage.has_estimate == (name == graph.output)
        assert not stage.has_estimate or torch.equal(outputs[0], case.estimate)
        for value, output in zip(stage.values_out, outputs[stage.has_estimate :]):
            assert torch.equal(output, case.values[value]), (name, value)


def test_no_inplace_operations_remain(case):
    for node in case.captured.graph_module.graph.nodes:
        assert not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable), node
