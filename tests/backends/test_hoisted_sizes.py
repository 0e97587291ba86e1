"""What hoisted parts keep is known from the graph: the sizes are those of the memory that is held when it runs."""

from __future__ import annotations

import torch

from hybridiff_compiler.backends.cuda_graph import Replay, record_plainly
from hybridiff_compiler.backends.hoisted_sizes import with_hoisted
from hybridiff_compiler.backends.hoisting import Hoisted, hoist
from hybridiff_compiler.ir import Layer, LayerGraph
from hybridiff_compiler.planner import plan_memory
from hybridiff_compiler.runtime.branch_calls import capture_branch


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def test_sizes_are_those_of_what_is_held(bench):
    captured = capture_branch(bench.denoiser, bench.signature)
    graph = with_hoisted(captured)
    stage = captured.whole()
    parts = hoist(stage)
    assert parts is not None
    values = [node.meta["val"] for node in stage.module.graph.nodes if node.op == "placeholder"]
    specs = [(tuple(value.shape), value.dtype) for value in values]
    call = Hoisted.build(parts, lambda part: part.module)
    replay = Replay(call, specs, torch.device("cpu"), record_plainly)
    once, times = replay._once, replay._times
    assert once is not None
    assert times is not None
    assert sum(layer.once_bytes for layer in graph.layers) == nbytes(once.results) == nbytes(once._outputs) > 0
    held = nbytes(times._tables[0][0])
    assert sum(layer.timed_bytes for layer in graph.layers) == held > 0
    assert any(layer.takes_timestep for layer in graph.layers)
    # A plan's prediction covers it, and only says more.
    arguments = {"ranks": 2, "parameter_bytes": 0}
    branch = [pattern for pattern in bench.patterns if pattern.name == "branch"]
    more, less = (plan_memory(each, bench.signature, branch, (), **arguments) for each in (graph, captured.layers))
    assert more[0].total - less[0].total >= nbytes(once.results) + nbytes(once._outputs) + 2 * held


def test_graphs_from_before_this_was_counted_stay_what_they_are(bench):
    graph = capture_branch(bench.denoiser, bench.signature).layers
    assert not {"once_bytes", "timed_bytes", "takes_timestep"} & set(Layer(name="a").model_dump())
    counted = graph.layers[0].model_copy(update={"once_bytes": 5, "takes_timestep": True})
    again = LayerGraph.model_validate(graph.model_copy(update={"layers": (counted, *graph.layers[1:])}).model_dump())
    assert (again.layers[0].once_bytes, again.layers[0].takes_timestep) == (5, True)
    assert again.fingerprint() == graph.fingerprint()
