"""Arithmetic of fx nodes, counted on meta tensors by torch's own formulas (matmul, convolution, attention)."""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops"]


def count_flops(graph: fx.Graph, among: Container[fx.Node] | None = None) -> dict[str, float]:
    """FLOPs (a multiply-add counts as two) by node name, for the nodes that have any.

    Composite operations such as linear or attention are counted by what they decompose into.

    Args:
        graph: with values as each node's `meta["val"]`.
        among: count only these nodes.
    """
    known: dict[str, float] = {}
    result: dict[str, float] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem or (among is not None and node not in among):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), _to_meta)
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), (args, kwargs))
        key = repr((str(node.target), pytree.tree_map_only(torch.Tensor, _describe, (args, kwargs))))
        if key not in known:
            known[key] = _run(node, args, kwargs)
        if known[key]:
            result[node.name] = known[key]
    return result


def _run(node: fx.Node, args: Any, kwargs: Any) -> float:
    assert callable(node.target)
    with FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)
    return float(counter.get_total_flops())


def _to_meta(node: fx.Node) -> Any:
    return pytree.tree_map_only(
        torch.Tensor,
        lambda v: torch.empty_strided(tuple(v.shape), v.stride(), dtype=v.dtype, device="meta"),
        node.meta["val"],
    )


def _describe(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tuple(tensor.shape), tensor.stride(), str(tensor.dtype))
