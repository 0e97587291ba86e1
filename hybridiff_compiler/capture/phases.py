"""Phases: a rank's part of a computation, as graphs without communication and the messages between them."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

__all__ = ["Parcel", "Phase", "PhaseBuilder"]

_CONSTANT = -1
"""Phase of what depends on parameters only; it is repeated in every phase that reads it."""


@dataclass(frozen=True)
class Parcel:
    """Values that travel together between this rank and another."""

    peer: int
    names: tuple[str, ...]
    specs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Shape and dtype of each."""


@dataclass(frozen=True)
class Phase:
    """One graph and the messages after it."""

    module: fx.GraphModule
    """`gives = module(*takes)`."""
    takes: tuple[str, ...]
    """Names of values of earlier phases, received ones among them, or `LATENTS`."""
    gives: tuple[str, ...]
    sends: tuple[Parcel, ...]
    receives: tuple[Parcel, ...]


class PhaseBuilder:
    """One rank's operations, each in the first phase in which its operands are there.

    All ranks must ask for the same messages in the same order, so that both ends of each agree.
    """

    def __init__(self, module: nn.Module) -> None:
        """`module` has the parameters."""
        self._module = module
        self._graph = fx.Graph()
        self._level: dict[fx.Node, int] = {}
        self._sends: dict[tuple[int, int], list[fx.Node]] = defaultdict(list)
        self._receives: dict[tuple[int, int], list[fx.Node]] = defaultdict(list)
        """By phase and other rank, in the order of the message."""
        self._count = 0
        self._constants: dict[str, Tensor] = {}

    def parameter(self, name: str) -> fx.Node:
        """A tensor of the module, by its qualified name."""
        return self._attribute(name, operator.attrgetter(name)(self._module))

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A tensor of one's own."""
        self._constants[name] = value
        return self._attribute(name, value)

    def _attribute(self, name: str, value: Tensor) -> fx.Node:
        node = self._graph.get_attr(name)
        node.meta["val"] = torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device="meta")
        self._level[node] = _CONSTANT
        return node

    def input(self, name: str, value: Tensor) -> fx.Node:
        """An input of the first phase, shaped like `value`."""
        return self._placeholder(name, value, 0)

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """One operation; its shapes are found by running it without data."""
        node = self._graph.call_function(target, args, kwargs)
        values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        values = pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), values)
        node.meta["val"] = target(*values[0], **values[1])
        self._level[node] = max((self._level[n] for n in node.all_input_nodes), default=_CONSTANT)
        return node

    def swap(self, at: fx.Node, peer: int, given: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Send `given` to a rank at the end of the phase that computes `at`, and receive a tensor of `shape`."""
        level, value = self._level[at], given.meta["val"]
        self._count += 1
        arrived = self._placeholder(
            f"received_{self._count}", torch.empty(shape, dtype=value.dtype, device="meta"), level + 1
        )
        self._sends[level, peer].append(given)
        self._receives[level, peer].append(arrived)
        return arrived

    def _placeholder(self, name: str, value: Tensor, level: int) -> fx.Node:
        node = self._graph.placeholder(name)
        node.meta["val"] = torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
        self._level[node] = level
        return node

    def phases(self, result: fx.Node) -> tuple[Phase, ...]:
        """Everything that `result` and the messages need; what nobody needs is left out."""
        needed, queue = set(), [result, *(node for nodes in self._sends.values() for node in nodes)]
        while queue:
            node = queue.pop()
            if node not in needed:
                needed.add(node)
                queue.extend(node.all_input_nodes)
        last = max([self._level[result], *(level for level, _ in self._receives)])
        return tuple(self._phase(level, needed, result) for level in range(last + 1))

    def _phase(self, level: int, needed: set[fx.Node], result: fx.Node) -> Phase:
        members = {node for node in needed if node.op == "call_function" and self._level[node] == level}
        queue = list(members)
        while queue:
            constant = {
                source for source in queue.pop().all_input_nodes
                if source.op == "call_function" and self._level[source] == _CONSTANT
            }
            queue += constant - members
            members |= constant
        inside = [node for node in self._graph.nodes if node in members]
        sends = {peer: nodes for (at, peer), nodes in self._sends.items() if at == level}
        receives = {peer: nodes for (at, peer), nodes in self._receives.items() if at == level}
        outside = dict.fromkeys(source for node in inside for source in node.all_input_nodes if source not in members)
        takes = [node for node in outside if node.op != "get_attr"]
        wanted = {node for nodes in sends.values() for node in nodes} | {result}
        gives = [
            node for node in inside
            if self._level[node] == level and isinstance(node.meta["val"], Tensor)
            and (node in wanted or any(user in needed and user not in members for user in node.users))
        ]
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        for node in takes:
            copied[node] = graph.placeholder(node.name)
            copied[node].meta = dict(node.meta)
        for node in (*(node for node in outside if node.op == "get_attr"), *inside):
            copied[node] = graph.node_copy(node, copied.__getitem__)
        graph.output(tuple(copied[node] for node in gives))
        module = fx.GraphModule(self._tensors(graph), graph, class_name="Phase")
        return Phase(
            module.eval(), tuple(node.name for node in takes), tuple(node.name for node in gives),
            _parcels(sends), _parcels(receives),
        )

    def _tensors(self, graph: fx.Graph) -> dict[str, Any]:
        read = operator.attrgetter
        return {
            str(node.target): self._constants[str(node.target)] if node.target in self._constants
            else read(str(node.target))(self._module)
            for node in graph.nodes if node.op == "get_attr"
        }


def _parcels(nodes: Mapping[int, Sequence[fx.Node]]) -> tuple[Parcel, ...]:
    return tuple(
        Parcel(
            peer, tuple(node.name for node in values),
            tuple((tuple(node.meta["val"].shape), node.meta["val"].dtype) for node in values),
        )
        for peer, values in sorted(nodes.items())
    )
