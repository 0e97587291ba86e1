"""Linear layers of one module that read the same input become one: fewer and larger kernels.

The projections of an attention (query, key, value) are too small to fill a GPU one by one at a branch batch of one.
Their weights are put one below the other in memory, and the denoiser's own parameters become views of that memory. So
nothing is held twice, and whoever writes to a parameter (fusing a LoRA) writes to the merged weight.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture import StageGraph
from ..ir import InputError

__all__ = ["Merged", "join_parameters", "merge_linears"]

_ALIGNMENT = 16
"""Bytes; compiled kernels load whole vectors from the start of a weight."""
_LEAST_ROWS = 16
"""Of a weight; merging smaller ones saves nothing."""
_LINEAR = torch.ops.aten.linear.default
_MOVED = "_hybridiff_joined"
"""Attribute of parameters that were moved next to others here, and so may be moved again."""


@dataclass(frozen=True)
class Merged:
    """A stage graph with merged linear layers."""

    stage: StageGraph
    sources: Mapping[str, tuple[str, ...]]
    """Qualified names of the weights that a merged one consists of, by its name in the stage's module."""


def merge_linears(stage: StageGraph) -> Merged:
    """The same graph with merged linear layers; equal up to rounding, as a larger product may add up in another order.

    Linear layers are merged if they read the same value and belong to the same module. The weights are joined with
    `join_parameters`; where that is not possible, the layers stay as they are.
    """
    groups = _groups(stage.module.graph)
    if not groups:
        return Merged(stage, {})
    module = fx.GraphModule(stage.module, _copy(stage.module.graph), class_name="Stage")
    nodes = {node.name: node for node in module.graph.nodes}
    sources: dict[str, tuple[str, ...]] = {}
    for names in groups:
        group = [nodes[name] for name in names]
        weights = [str(node.args[1].target) for node in group]
        biases = [str(node.args[2].target) for node in group] if len(group[0].args) > 2 else []
        live = [operator.attrgetter(name)(stage.module) for name in weights]
        live_biases = [operator.attrgetter(name)(stage.module) for name in biases]
        if not (_can_join(live) and (not biases or _can_join(live_biases))):
            continue
        number = len(sources)
        added = {f"merged_{number}_weight": (weights, join_parameters(live))}
        if biases:
            added[f"merged_{number}_bias"] = (biases, join_parameters(live_biases))
        for name, (parts, tensor) in added.items():
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            sources[name] = tuple(parts)
        _replace(module.graph, group, list(added))
    module.graph.eliminate_dead_code()
    module.graph.lint()
    # Made anew: it must hold only the weights that it still reads.
    merged = fx.GraphModule(module, module.graph, class_name="Stage").eval()
    return Merged(replace(stage, module=merged), sources)


def join_parameters(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor that holds `parameters` one after the other along dimension 0, in shared memory.

    Parameters that lie in memory like that already are left alone; otherwise they are moved there. Graphs that were
    made for the places where they were must not run any more; `LiveWeights` and `AotStage` see to that.

    Raises:
        InputError: they are of several kinds, not plain, made in inference mode, or parts of somebody else's memory.
    """
    if not _can_join(parameters):
        kinds = sorted({f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} on {t.device}" for t in parameters})
        raise InputError(
            f"weights of merged layers cannot share memory (got {', '.join(kinds)}); they must be plain contiguous "
            "tensors of one dtype and device with memory of their own, loaded outside of torch.inference_mode"
        )
    first = parameters[0]
    shape = (sum(p.shape[0] for p in parameters), *first.shape[1:])
    with torch.inference_mode(False), torch.no_grad():
        if not _are_neighbours(parameters):
            joint = torch.cat([p.detach() for p in parameters])
            for parameter, part in zip(parameters, joint.split([p.shape[0] for p in parameters])):
                parameter.data = part
                setattr(parameter, _MOVED, True)
        return first.detach().as_strided(shape, first.stride())


def _groups(graph: fx.Graph) -> list[list[str]]:
    """Names of the linear nodes to merge, in graph order."""
    found: dict[tuple[Any, ...], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _LINEAR and _is_plain(node):
            weight = str(node.args[1].target)
            module = weight.rpartition(".")[0].rpartition(".")[0]
            found[node.args[0], module, len(node.args)].append(node)
    return [
        [node.name for node in group] for group in found.values()
        if len(group) > 1 and len({node.args[1] for node in group}) == len(group)
    ]


def _is_plain(node: fx.Node) -> bool:
    """Whether the weights are used as they are and the results are seen by other operations only."""
    weights = node.args[1:]
    return (
        not node.kwargs and all(isinstance(weight, fx.Node) and weight.op == "get_attr" for weight in weights)
        and isinstance(node.args[0], fx.Node) and all(user.op != "output" for user in node.users)
    )


def _copy(graph: fx.Graph) -> fx.Graph:
    result = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        known[node] = result.node_copy(node, known.__getitem__)
    return result


def _replace(graph: fx.Graph, group: Sequence[fx.Node], names: Sequence[str]) -> None:
    """One linear layer with the weights `names` and its results' parts in the place of `group`."""
    sizes = [node.meta["val"].shape[-1] for node in group]
    with graph.inserting_before(group[0]):
        weights = [graph.get_attr(name) for name in names]
        merged = graph.call_function(_LINEAR, (group[0].args[0], *weights))
        parts = graph.call_function(torch.ops.aten.split_with_sizes.default, (merged, sizes, -1))
        merged.meta["val"] = torch.cat([node.meta["val"] for node in group], -1)
        parts.meta["val"] = merged.meta["val"].split(sizes, -1)
        for weight, position in zip(weights, (1, 2)):
            values = [node.args[position].meta.get("val") for node in group]  # type: ignore[union-attr]
            if all(isinstance(value, Tensor) for value in values):
                weight.meta["val"] = torch.cat([value for value in values if value is not None])
        for index, node in enumerate(group):
            part = graph.call_function(operator.getitem, (parts, index))
            part.meta = {**node.meta, "val": parts.meta["val"][index]}
            for user in list(node.users):
                if user.target is torch.ops.aten.view.default:  # a part has other strides than a result of its own
                    user.target = torch.ops.aten.reshape.default
            node.replace_all_uses_with(part)
    for node in group:
        graph.erase_node(node)


def _can_join(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    plain: Callable[[Tensor], bool] = lambda t: (  # noqa: E731
        type(t) in (nn.Parameter, Tensor) and t.device.type != "meta" and t.is_contiguous() and not t.is_inference()
        and t.dtype == first.dtype and t.device == first.device and t.shape[1:] == first.shape[1:]
        and t.dtype.is_floating_point and t.nbytes % _ALIGNMENT == 0 and t.dim() > 0 and t.shape[0] >= _LEAST_ROWS
    )
    if not all(map(plain, tensors)) or len({id(t) for t in tensors}) != len(tensors):
        return False
    return _are_neighbours(tensors) or all(
        t.untyped_storage().nbytes() == t.nbytes or hasattr(t, _MOVED) for t in tensors
    )


def _are_neighbours(tensors: Sequence[Tensor]) -> bool:
    return all(
        after.data_ptr() == before.data_ptr() + before.nbytes
        and after.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
        for before, after in pairwise(tensors)
    )
