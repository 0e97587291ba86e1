"""What goes into a stage graph and what comes out: names, shapes, dtypes, and arguments brought into that form."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..capture import StageGraph
from ..ir import Data, InputError

__all__ = ["ESTIMATE", "StageInterface", "TensorSpec", "example_arguments", "fit_arguments", "stage_digest",
           "stage_inputs", "stage_interface", "stage_outputs", "stage_weights", "tensor_spec", "weights_digest"]

ESTIMATE = "estimate"
"""Name of the denoiser's estimate among the outputs of a stage."""

_ALIGNMENT = 16
"""Bytes; compiled kernels load whole vectors from the start of their arguments."""


class TensorSpec(Data):
    """One input or output of a stage graph."""

    name: str = Field(min_length=1)
    """Leaf path of a denoiser input, name of a value between layers, or `estimate`."""
    shape: tuple[int, ...]
    dtype: str
    """torch dtype without the `torch.` prefix."""

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class StageInterface:
    """What loading an artifact needs to know of the stage that it was built from: no graph."""

    inputs: tuple[TensorSpec, ...]
    """Arguments in order: leaf paths of the denoiser's inputs, then names of values."""
    outputs: tuple[TensorSpec, ...]
    """Results in order: the estimate if the stage has it, then names of values."""
    weights: Mapping[str, Tensor]
    """Every tensor that the stage reads, by qualified name, in the graph's order: the live ones."""


def stage_interface(stage: StageGraph) -> StageInterface:
    """The interface of a stage that is at hand as a graph."""
    return StageInterface(stage_inputs(stage), stage_outputs(stage), stage_weights(stage))


def stage_inputs(stage: StageGraph) -> tuple[TensorSpec, ...]:
    """The arguments in order: leaf paths of the denoiser's inputs, then names of values."""
    names = (*stage.inputs, *stage.values_in)
    return tuple(_spec(name, node) for name, node in zip(names, _placeholders(stage), strict=True))


def stage_outputs(stage: StageGraph) -> tuple[TensorSpec, ...]:
    """The results in order: the estimate if the stage has it, then names of values."""
    names = (*([ESTIMATE] if stage.has_estimate else []), *stage.values_out)
    nodes = stage.module.graph.output_node().args[0]
    assert isinstance(nodes, (tuple, list))
    return tuple(_spec(name, node) for name, node in zip(names, nodes, strict=True))


def example_arguments(stage: StageGraph) -> tuple[Tensor, ...]:
    """Zeros of the right shapes, dtypes and devices, for exporting."""
    values = [node.meta["val"] for node in _placeholders(stage)]
    return tuple(torch.zeros(value.shape, dtype=value.dtype, device=value.device) for value in values)


def fit_arguments(arguments: Sequence[Tensor], specs: Sequence[TensorSpec]) -> list[Tensor]:
    """`arguments` as a compiled stage wants them: contiguous and aligned; copied only where they are not.

    Compiled code reads memory by the recorded shapes without looking, so anything else is refused here.

    Raises:
        InputError: another number of arguments, or one of another shape or dtype.
    """
    if len(arguments) != len(specs):
        raise InputError(f"the stage takes {len(specs)} arguments, got {len(arguments)}")
    fitted = []
    for argument, spec in zip(arguments, specs):
        if tuple(argument.shape) != spec.shape or argument.dtype != getattr(torch, spec.dtype):
            raise InputError(
                f"the stage was compiled for {spec}, got {str(argument.dtype).removeprefix('torch.')}"
                f"[{','.join(map(str, argument.shape))}]; run the shapes and dtype of the plan"
            )
        argument = argument.contiguous()
        fitted.append(argument.clone() if argument.data_ptr() % _ALIGNMENT else argument)
    return fitted


def stage_digest(stage: StageGraph) -> str:
    """sha256 of what the stage computes: operations, shapes, dtypes and names, whatever the device and the weights.

    An artifact is found by this digest, so that it can never stand in for another graph.
    """
    lines = [repr((stage.inputs, stage.values_in, stage.values_out, stage.has_estimate))]
    for node in stage.module.graph.nodes:
        arguments = pytree.tree_map_only(torch.device, lambda device: "device", (node.args, node.kwargs))
        lines.append(f"{node.op} {node.name} {node.target} {arguments} {_value_text(node.meta.get('val'))}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def tensor_spec(name: str, tensor: Tensor) -> TensorSpec:
    """Name, shape and dtype of a tensor."""
    return TensorSpec(name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def stage_weights(stage: StageGraph) -> dict[str, Tensor]:
    """Every tensor that the stage graph holds, by qualified name: the live parameters themselves."""
    names = dict.fromkeys(str(node.target) for node in stage.module.graph.nodes if node.op == "get_attr")
    return {name: operator.attrgetter(name)(stage.module) for name in names}


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 over the names and bytes of tensors such as `stage_weights`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _placeholders(stage: StageGraph) -> list[fx.Node]:
    return [node for node in stage.module.graph.nodes if node.op == "placeholder"]


def _spec(name: str, node: fx.Node) -> TensorSpec:
    return tensor_spec(name, node.meta["val"])


def _value_text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_value_text, value))})"
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else str(value)
