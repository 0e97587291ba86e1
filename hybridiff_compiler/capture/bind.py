"""Binding: a graph captured on one device (usually `meta`) gets the parameters of a real denoiser on another."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..ir.errors import PlanMismatchError
from .export import module_device
from .graph import CapturedDenoiser

__all__ = ["bind"]


def bind(captured: CapturedDenoiser, denoiser: nn.Module) -> CapturedDenoiser:
    """`captured` with the parameters of `denoiser` (by reference) and its device in place of the captured one.

    Cheaper than capturing again, and the layer graph is the same object. The device is that of the denoiser's first
    parameter.

    Raises:
        PlanMismatchError: the denoiser lacks a parameter, or has it in another shape or dtype.
    """
    source, target = module_device(captured.graph_module), module_device(denoiser)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    tensors: dict[str, torch.Tensor] = {}
    for node in captured.graph_module.graph.nodes:
        new = copied[node] = graph.node_copy(node, lambda arg: copied[arg])
        if node.op == "get_attr":
            tensors[node.target] = _find(captured, denoiser, node, target)
        elif node.op == "call_function":
            new.args, new.kwargs = _move((new.args, new.kwargs), source, target)
    module = fx.GraphModule(tensors, graph, class_name=type(denoiser).__name__)
    return replace(captured, graph_module=module.eval())


def _move(arguments: Any, source: torch.device, target: torch.device) -> Any:
    """Arguments of a node with the captured device replaced; other devices (cpu constants) stay."""
    return pytree.tree_map_only(torch.device, lambda device: target if device == source else device, arguments)


def _find(captured: CapturedDenoiser, denoiser: nn.Module, node: fx.Node, device: torch.device) -> torch.Tensor:
    """The denoiser's tensor of this qualified name; for a constant made in the forward, the captured one."""
    name, expected = str(node.target), node.meta["val"]
    try:
        value = operator.attrgetter(name)(denoiser)
    except AttributeError:
        value = operator.attrgetter(name)(captured.graph_module)
        if name not in captured.constants:
            raise PlanMismatchError(
                f"{type(denoiser).__name__} has no tensor {name!r}, which the captured graph reads; bind the model "
                "that was captured, or capture this one"
            ) from None
        if value.is_meta:
            raise PlanMismatchError(
                f"{type(denoiser).__name__} reads a constant ({name}) made during the forward on the meta device, "
                "whose value is not known; capture the real denoiser instead of binding"
            ) from None
        return value if expected.device.type == "cpu" else value.to(device)
    if value.shape != expected.shape or value.dtype != expected.dtype:
        raise PlanMismatchError(
            f"{name} is {value.dtype} {list(value.shape)}, captured as {expected.dtype} {list(expected.shape)}; bind a "
            "model of the captured size and dtype, or capture this one"
        )
    return value
