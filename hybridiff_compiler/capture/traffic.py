"""Bytes that layers move through memory, counted on the graph as a fusing compiler would run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import networkx as nx
import torch
from torch import fx

from .grouping import node_bytes

__all__ = ["count_traffic"]

_aten = torch.ops.aten
_VIEWS = frozenset({
    _aten.reshape, _aten.view, _aten._unsafe_view, _aten.transpose, _aten.permute, _aten.slice, _aten.select,
    _aten.expand, _aten.unsqueeze, _aten.squeeze, _aten.t, _aten.split, _aten.split_with_sizes, _aten.chunk,
    _aten.unbind, _aten.flatten, _aten.unflatten, _aten.alias, _aten.detach, _aten.view_as, _aten.expand_as,
})


def count_traffic(nodes: Sequence[fx.Node], flops: Mapping[str, float]) -> int:
    """Bytes that one layer reads and writes, parameters included.

    A matrix product, convolution or attention reads its operands and writes its result. Everything else that hangs
    together is taken for one kernel: it reads what comes from outside it and writes what is used outside it. Views are
    free.

    Args:
        nodes: of the layer.
        flops: arithmetic by node name; nodes that are missing have none.
    """
    inside = set(nodes)
    fused = nx.Graph()
    for node in nodes:
        if node.name not in flops:
            fused.add_node(node)
            fused.add_edges_from((node, source) for source in node.all_input_nodes
                                 if source in inside and source.name not in flops)
    kernels = [{node} for node in nodes if node.name in flops]
    kernels += [part for part in nx.connected_components(fused) if not all(map(_is_view, part))]
    total = 0
    for kernel in kernels:
        read = {source for node in kernel for source in node.all_input_nodes} - kernel
        written = {node for node in kernel if any(user not in kernel for user in node.users)}
        total += sum(map(_bytes, read)) + sum(map(_bytes, written))
    return total


def _is_view(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", node.target) in _VIEWS or node.name.startswith("getitem")


def _bytes(node: fx.Node) -> int:
    return node_bytes(node) if "val" in node.meta else 0
