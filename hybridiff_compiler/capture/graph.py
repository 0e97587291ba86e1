"""Capture: one call of a denoiser becomes a flat graph and a layer graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..ir.errors import InputError
from ..ir.layers import Layer, LayerGraph, Value
from .call import TIMESTEP, CallSignature, dtype_name, flatten_call, steady_leaves
from .export import export_call
from .flops import count_flops
from .grouping import Group, group_nodes, node_bytes
from .stage import StageGraph, evaluated_nodes, extract_stage
from .traffic import count_traffic

__all__ = ["CapturedDenoiser", "capture"]


@dataclass(frozen=True)
class CapturedDenoiser:
    """A denoiser at the shapes of one call, as a graph that can be cut between any two layers."""

    signature: CallSignature
    """What the captured call looked like; a call with another signature needs another capture."""
    graph_module: fx.GraphModule
    """Flat functional aten graph: one placeholder per tensor leaf, returns the estimate; its parameters are the
    denoiser's own objects."""
    layers: LayerGraph
    layer_of: Mapping[str, str]
    """Layer name of every `call_function` node, by node name."""
    input_names: tuple[str, ...]
    """Tensor leaf paths in placeholder order."""
    steady: tuple[str, ...]
    """Those that as a rule stay the same from step to step: all but the latents and the timestep."""
    timestep: str | None
    """The one that is the timestep; None if that is no tensor of its own."""
    constants: frozenset[str]
    """Qualified names of the tensors that the forward makes from Python values; they are not the denoiser's own."""
    output_spec: pytree.TreeSpec
    """How the denoiser wraps its output."""
    output_leaves: tuple[Any, ...]
    """Leaves of that output, with `Ellipsis` in the place of the estimate."""

    def extract(self, layer_names: Iterable[str], taps: Iterable[str] = ()) -> StageGraph:
        """The graph of a set of layers, which need not be contiguous; see `stage.extract_stage`.

        Raises:
            UsageError: an unknown layer, a tap that the stage does not compute, or nothing to return.
        """
        return extract_stage(
            self.graph_module, self.input_names, self.layer_of, layer_names, taps, steady=self.steady,
            timestep=self.timestep,
        )

    def shares(self, layer_names: Iterable[str], taps: Iterable[str] = ()) -> dict[str, float]:
        """Which part of each layer the graph of `extract` evaluates, 0 to 1: what neither the estimate nor a tap needs
        is left out of it. By arithmetic; by number of operations for a layer that has none."""
        done = evaluated_nodes(self.graph_module, self.layer_of, layer_names, taps)
        flops = self._node_flops
        busy = {layer.name for layer in self.layers.layers if layer.flops > 0}
        part: dict[str, float] = defaultdict(float)
        full: dict[str, float] = defaultdict(float)
        for node, layer in self.layer_of.items():
            weight = flops.get(node, 0.0) if layer in busy else 1.0
            full[layer] += weight
            part[layer] += weight * (node in done)
        return {name: part[name] / full[name] for name in self.layers.names if part[name]}

    @cached_property
    def _node_flops(self) -> dict[str, float]:
        return count_flops(self.graph_module.graph)

    def whole(self, taps: Iterable[str] = ()) -> StageGraph:
        """The graph of all layers, returning the estimate and the given values."""
        return self.extract(self.layers.names, taps)

    def rebuild_output(self, estimate: torch.Tensor) -> Any:
        """What the captured call would have returned, given its estimate (a tuple, or diffusers' output object)."""
        leaves = [estimate if leaf is ... else leaf for leaf in self.output_leaves]
        return pytree.tree_unflatten(leaves, self.output_spec)


def capture(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CapturedDenoiser:
    """Capture `denoiser(*args, **kwargs)` at the shapes and dtypes of these inputs; nothing is computed.

    The denoiser may live on any device, also on `meta` (the inputs are then moved there, too). It is traced in eval
    mode through its class's own forward; training flags and hooks on the instance are as before afterwards.

    Raises:
        UsageError: the arguments do not fit the forward, or a Python number is passed for a tensor.
        InputError: the forward cannot be exported, keeps state between calls, or returns not exactly one tensor.
    """
    signature, _ = flatten_call(denoiser, args, kwargs)
    exported = export_call(denoiser, args, kwargs)
    graph = exported.module.graph
    flops = count_flops(graph)
    groups = group_nodes(graph, exported.called_modules, flops)
    layer_of = {node.name: group.name for group in groups for node in group.nodes}
    return CapturedDenoiser(
        signature=signature,
        graph_module=exported.module,
        layers=_layer_graph(exported.module, groups, layer_of, flops),
        layer_of=layer_of,
        input_names=exported.input_names,
        steady=steady_leaves(denoiser, exported.input_names),
        timestep=TIMESTEP if TIMESTEP in exported.input_names else None,
        constants=exported.constants,
        output_spec=exported.output_spec,
        output_leaves=exported.output_leaves,
    )


def _layer_graph(
    module: fx.GraphModule, groups: Sequence[Group], layer_of: Mapping[str, str], flops: Mapping[str, float]
) -> LayerGraph:
    layers = tuple(
        Layer(
            name=group.name,
            kind=group.kind,
            parameter_bytes=_parameter_bytes(module, group),
            flops=sum(flops.get(node.name, 0.0) for node in group.nodes),
            traffic_bytes=count_traffic(group.nodes, flops),
        )
        for group in groups
    )
    position = {layer.name: index for index, layer in enumerate(layers)}
    values = []
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        producer = layer_of[node.name]
        consumers = {layer_of[user.name] for user in node.users if user.op == "call_function"} - {producer}
        if consumers:
            values.append(_value(node, producer, sorted(consumers, key=position.__getitem__)))
    (estimate,) = module.graph.output_node().all_input_nodes
    return LayerGraph(layers=layers, values=tuple(values), output=layer_of[estimate.name])


def _value(node: fx.Node, producer: str, consumers: Sequence[str]) -> Value:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"layer {producer!r} passes {node.name!r}, a {type(value).__name__}, to {consumers[0]!r}; only tensors can "
            "flow between layers, so capture at fixed shapes"
        )
    return Value(
        name=node.name,
        producer=producer,
        consumers=tuple(consumers),
        shape=tuple(value.shape),
        dtype=dtype_name(value.dtype),
        nbytes=node_bytes(node),
    )


def _parameter_bytes(module: fx.GraphModule, group: Group) -> int:
    sizes: dict[str, int] = defaultdict(int)
    for node in group.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                value = source.meta["val"]
                sizes[str(source.target)] = value.numel() * value.element_size()
    return sum(sizes.values())
