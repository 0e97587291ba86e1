"""Grouping the nodes of a flat graph into layers, from the graph alone.

1. A *block list* is a numbered list of modules (`P.0`, `P.1`, ...) whose called elements are all compound, that is,
   call modules themselves: transformer blocks, resnets, samplers. (`[Linear, Dropout]` is none.) Everything that holds
   a block list, directly or further down, is a *container*. Every other module is atomic: it is never split.
2. The key of a node is the outermost atomic module it was called in, else the innermost container. Layers are
   contiguous runs of equal key in graph order: acyclic by construction.
3. Runs without a matrix product, convolution or attention (time tables, skip concatenations, residual sums, norms in
   front of a projection) are glue, not layers. Glue between two layers is divided at the point where the fewest bytes
   are live, and of such points where the layer after reads least: the nodes in front join the layer before, the rest
   the layer after. So a residual sum stays with the layer that ends in it, and a skip concatenation goes to the layer
   that reads it.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch
from torch import fx

from .export import module_stack

__all__ = ["ROOT", "Group", "find_containers", "group_nodes", "node_bytes"]

ROOT = "forward"
"""Layer name for arithmetic in the denoiser's own forward, outside every submodule."""


@dataclass
class Group:
    """One layer to be: its name, the class of its module, and its nodes in graph order."""

    name: str
    kind: str
    nodes: list[fx.Node] = field(default_factory=list)


def group_nodes(graph: fx.Graph, called_modules: Mapping[str, str], flops: Mapping[str, float]) -> list[Group]:
    """The layers of `graph` in execution order; every `call_function` node is in exactly one.

    Args:
        graph: a flat graph, where parts (`getitem`) directly follow their multi-output node.
        called_modules: class name of every called module by path.
        flops: arithmetic by node name; nodes that are missing have none.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    keys = _keys(nodes, find_containers(called_modules))
    runs = [[node for node, _ in run] for _, run in groupby(zip(nodes, keys), key=operator.itemgetter(1))]
    owners: list[tuple[str, list[fx.Node]]] = []
    glue: list[fx.Node] = []
    key_of = dict(zip(nodes, keys))
    live = _live_bytes(nodes)
    for run in runs:
        if not any(node.name in flops for node in run):
            glue += run
            continue
        at = _cheapest_point(glue, run, live) if owners else 0
        if owners:
            owners[-1][1].extend(glue[:at])
        owners.append((key_of[run[0]], glue[at:] + run))
        glue = []
    if owners:
        owners[-1][1].extend(glue)
    else:
        owners.append((ROOT, glue))
    return _named(owners, called_modules)


def find_containers(called_modules: Mapping[str, str]) -> set[str]:
    """Paths of the modules that hold a block list, directly or in a descendant; the denoiser itself is always one."""
    compound = {path.rpartition(".")[0] for path in called_modules}
    compound |= {prefix for path in list(compound) for prefix in _prefixes(path)}
    lists: dict[str, list[str]] = defaultdict(list)
    for path in called_modules:
        parent, _, leaf = path.rpartition(".")
        if leaf.isdigit():
            lists[parent].append(path)
    containers = {""}
    for parent, elements in lists.items():
        if all(element in compound for element in elements):
            containers |= {prefix for prefix in (parent, *_prefixes(parent)) if prefix in called_modules}
    return containers


def _prefixes(path: str) -> list[str]:
    """Proper prefixes of a dotted path, the empty one included."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def _keys(nodes: Sequence[fx.Node], containers: set[str]) -> list[str]:
    keys: list[str] = []
    previous = ""
    for node in nodes:
        if node.target is not operator.getitem:  # a part is grouped with the operation it is a part of
            paths = [path for path, _ in module_stack(node)]
            if paths:  # nodes that functionalisation made may lack a stack: they belong where they stand
                previous = next((path for path in paths if path not in containers), paths[-1])
        keys.append(previous)
    return keys


def _live_bytes(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Bytes that are computed before each node and still read by it or later."""
    position = {node: index for index, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 2)
    for index, node in enumerate(nodes):
        last = max((position.get(user, len(nodes)) for user in node.users), default=index)
        change[index + 1] += node_bytes(node)
        change[last + 1] -= node_bytes(node)
    return dict(zip(nodes, accumulate(change)))


def node_bytes(node: fx.Node) -> int:
    """Size of the tensor that a node computes; 0 for a multi-output operation, whose parts count."""
    value = node.meta["val"]
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _cheapest_point(glue: Sequence[fx.Node], run: Sequence[fx.Node], live: Mapping[fx.Node, int]) -> int:
    """How many nodes of the glue join the layer before; the rest joins `run`.

    Of points with equally many live bytes the one where the layer after reads least, then the first.
    """
    tail = (*glue, *run)
    points = [i for i in range(len(glue) + 1) if tail[i].target is not operator.getitem]
    return min(points, key=lambda i: (live[tail[i]], _bytes_read(tail[i:]), i))


def _bytes_read(nodes: Sequence[fx.Node]) -> int:
    """Bytes of the computed values that `nodes` read from other nodes."""
    outside = {source for node in nodes for source in node.all_input_nodes if source.op == "call_function"}
    return sum(map(node_bytes, outside.difference(nodes)))


def _named(owners: Sequence[tuple[str, list[fx.Node]]], called_modules: Mapping[str, str]) -> list[Group]:
    total = Counter(key for key, _ in owners)
    seen: Counter[str] = Counter()
    groups = []
    for key, nodes in owners:
        name = key or ROOT
        if total[key] > 1:
            name, seen[key] = f"{name}#{seen[key]}", seen[key] + 1
        groups.append(Group(name=name, kind=called_modules.get(key, ""), nodes=nodes))
    return groups
