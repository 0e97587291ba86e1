"""Extraction of a set of layers as a graph of its own, sharing parameters by reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..ir.errors import UsageError

__all__ = ["StageGraph", "evaluated_nodes", "extract_stage"]

_MAX_NAMED = 3


@dataclass(frozen=True)
class StageGraph:
    """A set of layers as one callable graph: `outs = module(*inputs, *values_in)`, `outs` a flat tuple.

    Static shapes and dtypes: those of the captured call. Strides of `values_in` are free, so a transferred copy may be
    contiguous; `values_out` are always contiguous. The module holds only the parameters that the stage reads, as the
    same objects as in the denoiser: in-place edits (LoRA fusing, loading weights) are seen. No operation writes to its
    inputs, but an output may share memory with an input.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    """Leaf paths of the denoiser inputs that it reads: the first placeholders."""
    values_in: tuple[str, ...]
    """Names of the values that it reads from layers outside the stage: the next placeholders, in graph order."""
    values_out: tuple[str, ...]
    """Names of the values that it returns, in the order requested, after the estimate."""
    has_estimate: bool
    """Whether the first output is the denoiser's estimate."""
    steady: tuple[str, ...] = ()
    """Those of `inputs` that as a rule stay the same from step to step (prompt embeddings, sizes)."""
    timestep: str | None = None
    """The one of `inputs` that is the timestep, if it is there."""


def extract_stage(
    graph_module: fx.GraphModule,
    input_names: Sequence[str],
    layer_of: Mapping[str, str],
    layer_names: Iterable[str],
    taps: Iterable[str] = (),
    *,
    steady: Iterable[str] = (),
    timestep: str | None = None,
) -> StageGraph:
    """Build the graph of any set of layers; they need not be contiguous.

    Values from outside the set become placeholders, even those whose computation could be repeated cheaply. Nodes that
    neither the estimate nor a tap needs are left out.

    Args:
        graph_module: the whole denoiser as a flat functional graph with one output.
        input_names: leaf paths of its placeholders, in order.
        layer_of: layer name of every `call_function` node, by node name.
        layer_names: the layers of the stage, in any order.
        taps: values (node names) produced inside the stage that it must return; repeated names count once.
        steady: inputs that as a rule stay the same from step to step.
        timestep: the input that is the timestep.

    Raises:
        UsageError: an unknown layer, a tap that the stage does not compute, or nothing to return.
    """
    inside, wanted = frozenset(layer_names), tuple(dict.fromkeys(taps))
    nodes = {node.name: node for node in graph_module.graph.nodes}
    (estimate,) = graph_module.graph.output_node().all_input_nodes
    _check(inside, wanted, layer_of)
    has_estimate = layer_of[estimate.name] in inside
    _check_tensors(nodes[name] for name in wanted)
    roots = ([estimate] if has_estimate else []) + [nodes[name] for name in wanted]
    if not roots:
        raise UsageError(
            f"a stage of {len(inside)} layers without the output layer ({layer_of[estimate.name]!r}) returns nothing; "
            "name the values it must return as taps"
        )

    needed = _slice(roots, inside, layer_of)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    placeholders = [node for node in nodes.values() if node.op == "placeholder"]
    inputs = [(path, node) for path, node in zip(input_names, placeholders) if node in needed]
    values = [n for n in nodes.values() if n in needed and n.op == "call_function" and layer_of[n.name] not in inside]
    for node in [node for _, node in inputs] + values:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = dict(node.meta)
    for node in nodes.values():
        if node in needed and node not in copied:
            copied[node] = graph.node_copy(node, lambda arg: copied[arg])
    outputs = [copied[estimate]] if has_estimate else []
    outputs += [_contiguous(graph, nodes[name], copied[nodes[name]]) for name in wanted]
    graph.output(tuple(outputs))
    module = fx.GraphModule(graph_module, graph, class_name="Stage").eval()
    paths, same = tuple(path for path, _ in inputs), frozenset(steady)
    return StageGraph(
        module, paths, tuple(node.name for node in values), wanted, has_estimate,
        tuple(path for path in paths if path in same), timestep if timestep in paths else None,
    )


def evaluated_nodes(
    graph_module: fx.GraphModule, layer_of: Mapping[str, str], layer_names: Iterable[str], taps: Iterable[str] = ()
) -> frozenset[str]:
    """Names of the `call_function` nodes that the graph of `extract_stage` evaluates."""
    inside = frozenset(layer_names)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    (estimate,) = graph_module.graph.output_node().all_input_nodes
    roots = [node for node in (estimate, *(nodes[name] for name in taps)) if layer_of[node.name] in inside]
    return frozenset(
        node.name for node in _slice(roots, inside, layer_of)
        if node.op == "call_function" and layer_of[node.name] in inside
    )


def _check(inside: frozenset[str], wanted: Sequence[str], layer_of: Mapping[str, str]) -> None:
    unknown = sorted(inside.difference(layer_of.values()))
    if unknown or not inside:
        known = list(dict.fromkeys(layer_of.values()))
        raise UsageError(
            f"a stage needs layers of this denoiser, got {unknown[:_MAX_NAMED] or 'none'}; "
            f"it has {len(known)} layers: {', '.join(known[:_MAX_NAMED])}, ..., {known[-1]}"
        )
    outside = [name for name in wanted if layer_of.get(name) not in inside]
    if outside:
        where = "; ".join(f"{name!r} belongs to {layer_of.get(name, 'no layer')!r}" for name in outside[:_MAX_NAMED])
        raise UsageError(f"taps must be values that the stage computes: {where}; add that layer or drop the tap")


def _check_tensors(taps: Iterable[fx.Node]) -> None:
    for node in taps:
        if not isinstance(node.meta["val"], torch.Tensor):
            parts = ", ".join(user.name for user in node.users)
            raise UsageError(f"tap {node.name!r} has several outputs, not one tensor; tap its parts instead: {parts}")


def _slice(roots: Sequence[fx.Node], inside: frozenset[str], layer_of: Mapping[str, str]) -> set[fx.Node]:
    """The nodes that `roots` depend on, up to and including the first ones outside the stage."""
    needed: set[fx.Node] = set()
    queue = list(roots)
    while queue:
        node = queue.pop()
        if node in needed:
            continue
        needed.add(node)
        if node.op != "call_function" or layer_of[node.name] in inside:
            queue.extend(node.all_input_nodes)
    return needed


def _contiguous(graph: fx.Graph, original: fx.Node, node: fx.Node) -> fx.Node:
    """`node` made contiguous where the captured value was not: what is sent equals what an in-process reader gets."""
    value = original.meta["val"]
    if value.is_contiguous():
        return node
    result = graph.call_function(torch.ops.aten.contiguous.default, (node,))
    result.meta = {**original.meta, "val": value.contiguous()}
    return result
