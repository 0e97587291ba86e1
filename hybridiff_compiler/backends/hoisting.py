"""What does not change from step to step is computed once per generation.

Prompt embeddings enter a denoiser anew at every step, and with them everything that is made of them alone: keys and
values of every cross-attention, projections of the prompt, embeddings of sizes. `hoist` cuts a stage graph in two: what
follows from steady inputs, and the rest, which takes the results as further arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..capture import StageGraph
from ..capture.flops import count_flops

__all__ = ["Hoisted", "TwoParts", "hoist"]


@dataclass(frozen=True)
class TwoParts:
    """A stage graph cut in two."""

    once: StageGraph
    """From steady inputs to the values that `each` takes of them."""
    each: StageGraph
    """The stage with these values as last arguments; it still takes all the others."""
    positions: tuple[int, ...]
    """Which of the stage's arguments `once` takes."""


@dataclass(frozen=True)
class Hoisted:
    """Executables of `TwoParts`, with the calling convention of the stage that was cut."""

    once: Callable[..., Sequence[Tensor]]
    each: Callable[..., Sequence[Tensor]]
    positions: tuple[int, ...]

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """Both parts; whoever calls often may keep the results of `once` for as long as its arguments stay the same."""
        return self.each(*arguments, *self.once(*(arguments[index] for index in self.positions)))


def hoist(stage: StageGraph) -> TwoParts | None:
    """Cut what `stage` makes of its steady inputs alone; None when there is no arithmetic among it.

    Only values that took arithmetic (products, convolutions) are handed over: what is merely rearranged, converted or
    added costs nothing where it is read, and less memory traffic than its result.
    """
    nodes = list(stage.module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    leaves = dict(zip(placeholders, stage.inputs))
    steady = {node for node in placeholders if leaves.get(node) in stage.steady}
    once: set[fx.Node] = set()
    for node in nodes:
        if node.op == "call_function" and _is_pure(node) and all(
            source in steady or source in once or source.op == "get_attr" for source in node.all_input_nodes
        ):
            once.add(node)
    flops = count_flops(stage.module.graph, once)
    heavy: set[fx.Node] = set()
    for node in nodes:
        if node in once and (node.name in flops or any(source in heavy for source in node.all_input_nodes)):
            heavy.add(node)
    handed: list[fx.Node] = []
    for node in reversed(nodes):
        if node in once and any(user not in once for user in node.users):
            if node not in heavy or (node.name not in flops and _is_light(node)):
                once.discard(node)
            else:
                handed.append(node)
    if not handed:
        return None
    handed.reverse()
    names = tuple(node.name for node in handed)
    taken = [node for node in placeholders if node in steady and any(user in once for user in node.users)]
    return TwoParts(
        once=replace(
            stage, module=_once(stage.module, nodes, taken, once, handed), inputs=tuple(leaves[node] for node in taken),
            values_in=(), values_out=names, has_estimate=False,
        ),
        each=replace(
            stage, module=_each(stage.module, nodes, once, handed), values_in=(*stage.values_in, *names),
        ),
        positions=tuple(placeholders.index(node) for node in taken),
    )


def _once(
    module: fx.GraphModule, nodes: Sequence[fx.Node], taken: Sequence[fx.Node], once: set[fx.Node],
    handed: Sequence[fx.Node],
) -> fx.GraphModule:
    graph = fx.Graph()
    copied = {node: graph.node_copy(node) for node in taken}
    for node in nodes:
        if node in once or (node.op == "get_attr" and any(user in once for user in node.users)):
            copied[node] = graph.node_copy(node, copied.__getitem__)
    results = []
    for node in handed:
        result = graph.call_function(torch.ops.aten.contiguous.default, (copied[node],))
        result.meta = {**node.meta, "val": node.meta["val"].contiguous()}
        results.append(result)
    graph.output(tuple(results))
    return fx.GraphModule(module, graph, class_name="Once").eval()


def _each(
    module: fx.GraphModule, nodes: Sequence[fx.Node], once: set[fx.Node], handed: Sequence[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op == "placeholder":
            copied[node] = graph.node_copy(node)
    for node in handed:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = {**node.meta, "val": node.meta["val"].contiguous()}
    for node in nodes:
        read = node.op != "get_attr" or any(user not in once for user in node.users)
        if node not in once and node not in copied and read:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    return fx.GraphModule(module, graph, class_name="Stage").eval()


def _is_pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    return (
        isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )


def _is_light(node: fx.Node) -> bool:
    """Whether `node` only looks at its input in another way, or makes more of it than there was."""
    if node.target is operator.getitem:
        return True
    assert isinstance(node.target, torch._ops.OpOverload)
    if any(result.alias_info is not None for result in node.target._schema.returns):
        return True
    given = sum(_nbytes(source) for source in node.all_input_nodes if source.op != "get_attr")
    return _nbytes(node) > given


def _nbytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
