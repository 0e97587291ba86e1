"""Which operations of a captured image decoder can be computed on a band of rows, and what they read beyond it.

The image (and everything between it and the latents) is cut into bands along its height; band r belongs to rank r.
What a dimension means is not known from models but followed through the graph, operation by operation: a value has its
rows in dimension `dim`, `unit` indices for each row of the latents. Rules are for kinds of aten operations: pointwise
ones keep the rows where they are, a convolution reads a halo, a group norm needs the moments of all bands, attention
needs all keys and values for its own queries. An operation without a rule, or one that mixes rows in another way, is
computed on the whole value by every rank, and the next convolution starts from there again. So every decoder is
computed correctly; how much of it is worth it, `RowGraph.share` tells.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from ..ir.errors import InputError
from .export import ExportedCall, module_stack
from .flops import count_flops
from .row_rules import Rows, Split, rule_for

__all__ = ["RowGraph", "Rows", "Split", "split_rows"]

@dataclass(frozen=True)
class RowGraph:
    """A captured decoder with its operations classified."""

    exported: ExportedCall
    base: int
    """Rows of the latents."""
    splits: Mapping[fx.Node, Split]
    """Operations that are computed on bands; all others are computed whole by every rank."""
    whole: tuple[str, ...]
    """Why operations that read rows are computed whole, one entry per operation."""
    flops: Mapping[str, float] = field(repr=False)
    """Of the whole graph, by node name."""

    def share(self, ranks: int) -> float:
        """Arithmetic of the busiest of so many ranks, as a share of the whole decode."""
        total = sum(self.flops.values())
        names = {node.name for node in self.splits}
        split = sum(count for name, count in self.flops.items() if name in names)
        return (total - split + split * -(-self.base // ranks) / self.base) / total if total else 1.0


def split_rows(exported: ExportedCall) -> RowGraph:
    """Classify the operations of a decoder with one input (latents [N, C, ..., H, W]).

    Raises:
        InputError: nothing of it can be computed on a band; the message names the operations in the way.
    """
    graph = exported.module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    shapes = [tuple(node.meta["val"].shape) for node in inputs]
    if len(shapes) != 1 or len(shapes[0]) < 4:
        raise InputError(f"a decoder takes one tensor of latents [N, C, ..., H, W], this graph takes {shapes}")
    base = shapes[0][-2]
    state = _Pass(base)
    state.varying |= set(inputs)
    for node in graph.nodes:
        if node.op == "call_function" and not state.varying.isdisjoint(node.all_input_nodes):
            state.varying.add(node)
            state.visit(node)
    flops = count_flops(graph)
    result = RowGraph(exported, base, state.splits, tuple(state.whole), flops)
    if not any(node.name in flops for node in state.splits):
        raise InputError(
            "no convolution or matrix product of this decoder can be computed on a band of rows"
            + (f": {'; '.join(result.whole[:3])}" if result.whole else "") + "; it runs on the driver alone"
        )
    return result


class _Pass:
    """The classification under way, in graph order."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.splits: dict[fx.Node, Split] = {}
        self.whole: list[str] = []
        self.varying: set[fx.Node] = set()
        """What depends on the latents."""

    def visit(self, node: fx.Node) -> None:
        """Classify one node."""
        if node.target is operator.getitem:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if source in self.splits:
                self.splits[node] = Split(self.splits[source].rows, {source: self.splits[source].rows})
            return
        rule = rule_for(node.target)
        split = rule(self, node) if rule is not None else None
        if split is not None and self._fits(node, split):
            self.splits[node] = split
        elif any(operand in self.splits for operand in node.all_input_nodes):
            stack = module_stack(node)
            where = f" in {stack[-1][0]}" if stack else ""
            self.whole.append(f"{node.target}{where} " + ("has no rule" if rule is None else "mixes rows"))

    def rows(self, node: Any) -> Rows | None:
        """Where `node` is cut; None when it is whole."""
        return self.splits[node].rows if isinstance(node, fx.Node) and node in self.splits else None

    def _fits(self, node: fx.Node, split: Split) -> bool:
        """Every part of the result must have as many rows as the split says; a guard against unforeseen arguments."""
        values = node.meta["val"]
        parts = [v for v in (values if isinstance(values, (tuple, list)) else [values]) if isinstance(v, Tensor)]
        if split.kind == "norm":
            parts = parts[:1]
        size = self.base * split.rows.unit
        return all(v.dim() > split.rows.dim and v.shape[split.rows.dim] == size for v in parts)
