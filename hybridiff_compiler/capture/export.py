"""`torch.export` of a denoiser, brought into one flat, functional aten graph with parameters by reference."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from ..ir.errors import InputError, UsageError
from .call import bind_call, forward_signature, iter_leaves

__all__ = ["ExportedCall", "export_call", "module_device", "module_stack"]

_aten = torch.ops.aten
_ASSERTIONS = {_aten._assert_tensor_metadata.default}
# `reshape` is a `view` that copies where the strides do not allow a view. A boundary tensor may arrive contiguous
# where the captured one was not, so no node may rely on captured strides.
_VIEWS = {_aten.view.default, _aten._unsafe_view.default}
_STRIDED = {_aten.as_strided.default, _aten.as_strided_copy.default, _aten.as_strided_scatter.default}
_DROPOUTS = {
    _aten.dropout.default,
    _aten.feature_dropout.default,
    _aten.alpha_dropout.default,
    _aten.feature_alpha_dropout.default,
}


@dataclass(frozen=True)
class ExportedCall:
    """One call of a denoiser as a graph."""

    module: fx.GraphModule
    """Flat functional aten graph: one placeholder per tensor leaf, `get_attr` to the denoiser's own parameter objects
    under their qualified names; returns the estimate (one tensor)."""
    input_names: tuple[str, ...]
    """Tensor leaf paths in placeholder order."""
    constants: frozenset[str]
    """Qualified names of the tensors that the forward makes from Python values; they are not the denoiser's own."""
    called_modules: Mapping[str, str]
    """Class name of every submodule that was called, by module path (the denoiser itself is `""`)."""
    output_spec: pytree.TreeSpec
    """How the denoiser wraps its outputs."""
    output_leaves: tuple[Any, ...]
    """Leaves of the output, with `Ellipsis` in the place of the estimate."""


def export_call(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ExportedCall:
    """Trace `denoiser(*args, **kwargs)` in eval mode without gradients and return its graph.

    Raises:
        UsageError: the call passes a Python number where the forward takes a tensor.
        InputError: the forward cannot be exported, keeps state, or returns more than one tensor.
    """
    call = bind_call(denoiser, args, kwargs)
    _refuse_numbers(denoiser, call)
    if module_device(denoiser).type == "meta":
        call = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), call)
    name = type(denoiser).__name__
    with torch.no_grad(), _pristine(denoiser), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(denoiser, (), call, strict=False)
            if _needs_functionalisation(program):
                program = program.run_decompositions({})
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(
                f"{name} cannot be captured by torch.export at these inputs: {reason}; "
                "its forward must accept them and must not branch on tensor values"
            ) from error
    return _flatten(denoiser, program, call)


def module_device(module: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; cpu for a module with neither."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """`(module path, class name)` of the modules being called at `node`, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = []
    for path, cls in stack.values():
        qualified = cls if isinstance(cls, str) else cls.__qualname__
        entries.append((path.removeprefix("L['self']").lstrip("."), qualified.rsplit(".", 1)[-1]))
    return entries


def _refuse_numbers(denoiser: nn.Module, call: Mapping[str, Any]) -> None:
    """A number passed for a tensor would be baked into the graph, e.g. the timestep of one step."""
    parameters = forward_signature(denoiser).parameters
    for name, value in call.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or name not in parameters:
            continue
        parameter = parameters[name]
        untyped = parameter.annotation is inspect.Parameter.empty and not isinstance(parameter.default, (int, float))
        if untyped or "Tensor" in str(parameter.annotation):
            raise UsageError(
                f"{type(denoiser).__name__} was called with {name}={value!r}, a Python number, which capture would "
                f"bake into the graph; pass a tensor: {name}=torch.tensor({value!r})"
            )


@contextmanager
def _pristine(denoiser: nn.Module) -> Iterator[None]:
    """The denoiser in eval mode with its class's own forward; instance patches and training flags are restored."""
    training = {module: module.training for module in denoiser.modules()}
    instance: dict[str, Any] = denoiser.__dict__
    patched: dict[str, Any] = {key: instance.pop(key) for key in ("forward", "_compiled_call_impl") if key in instance}
    denoiser.eval()
    try:
        yield
    finally:
        instance.update(patched)
        for module, flag in training.items():
            module.training = flag


def _needs_functionalisation(program: ExportedProgram) -> bool:
    """Whether the graph holds in-place operations or subgraphs (autocast or grad-mode regions)."""
    return any(
        node.op == "get_attr" or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)
        for node in program.graph.nodes
    )


def _flatten(denoiser: nn.Module, program: ExportedProgram, call: Mapping[str, Any]) -> ExportedCall:
    name = type(denoiser).__name__
    graph = fx.Graph()
    copied: dict[fx.Node, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    constants: set[str] = set()
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}

    by_position = [s for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    input_names = []
    for path, position in _leaf_positions(call):
        if isinstance(by_position[position].arg, TensorArgument):
            node = placeholders[by_position[position].arg.name]
            copied[node] = graph.node_copy(node)
            input_names.append(path)
    for node in placeholders.values():
        spec = specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                copied[node] = spec.arg.value
        elif node.users:
            target, value = _resolve(denoiser, spec)
            tensors[target] = program.constants[target] if value is None else value
            if value is None:
                constants.add(target)
            copied[node] = graph.get_attr(target)
            copied[node].meta["val"] = node.meta["val"]

    called = {"": name}
    for node in program.graph.nodes:
        called.update(module_stack(node))
        if node.op == "call_function":
            _copy_call(node, graph, copied, name)
        elif node.op == "get_attr":
            raise InputError(f"{name} calls a subgraph ({node.target}), which cannot be split; call it inline")
    leaves, estimate = _outputs(program, name)
    graph.output(copied[estimate])
    graph.eliminate_dead_code()
    module = fx.GraphModule(tensors, graph, class_name=name)
    output_spec = program.call_spec.out_spec
    assert output_spec is not None
    return ExportedCall(module.eval(), tuple(input_names), frozenset(constants), called, output_spec, leaves)


def _leaf_positions(call: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """`(path, position among the exported inputs)` of every leaf, in the order of `iter_leaves`."""
    leaves, spec = pytree.tree_flatten(dict(call))
    for path, position in iter_leaves(pytree.tree_unflatten(map(_Position, range(len(leaves))), spec)):
        if isinstance(position, _Position):
            yield path, position.index


@dataclass(frozen=True)
class _Position:
    """In place of a leaf; a list of numbers would be one leaf."""

    index: int


def _resolve(denoiser: nn.Module, spec: InputSpec) -> tuple[str, torch.Tensor | None]:
    """Qualified name and tensor object of a lifted parameter, buffer or attribute; None for a constant of no module."""
    if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) or spec.target is None:
        raise InputError(
            f"{type(denoiser).__name__} captures a {spec.kind.name.lower()} ({spec.target}), which is not supported; "
            "only parameters, buffers and constant tensors are"
        )
    try:
        return spec.target, operator.attrgetter(spec.target)(denoiser)
    except AttributeError:
        return spec.target, None


def _copy_call(node: fx.Node, graph: fx.Graph, copied: dict[fx.Node, Any], name: str) -> None:
    if node in copied or node.target in _ASSERTIONS:
        return
    if node.target in _STRIDED:
        raise InputError(f"{name} uses {node.target}, which depends on memory layout; use view, reshape or slicing")
    if node.target in _DROPOUTS and not (node.args[2] if len(node.args) > 2 else node.kwargs.get("train")):
        copied[node] = copied[node.args[0]]  # type: ignore[index]
        return
    new = copied[node] = graph.node_copy(node, lambda arg: copied[arg])
    if node.target in _VIEWS:
        new.target = _aten.reshape.default
    # The parts of a multi-output operation are taken at once, so that every value between layers is one tensor.
    for user in node.users:
        if user.target is operator.getitem and user.args[0] is node:
            copied[user] = graph.node_copy(user, lambda arg: copied[arg])


def _outputs(program: ExportedProgram, name: str) -> tuple[tuple[Any, ...], fx.Node]:
    """Leaves of the output with `Ellipsis` for the estimate, and the node of the estimate."""
    by_name = {node.name: node for node in program.graph.nodes}
    leaves: list[Any] = []
    estimates: list[fx.Node] = []
    for spec in program.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise InputError(
                f"{name} changes its {spec.kind.name.lower().removesuffix('_mutation')} {spec.target!r} during a call; "
                "a denoiser must not keep state between calls"
            )
        if isinstance(spec.arg, TensorArgument):
            estimates.append(by_name[spec.arg.name])
        leaves.append(... if isinstance(spec.arg, TensorArgument) else getattr(spec.arg, "value", None))
    computed = [node for node in estimates if node.op == "call_function"]
    if len(estimates) != 1 or not computed:
        raise InputError(
            f"{name} returns {len(estimates)} tensors ({len(computed)} computed) at these inputs; capture needs "
            "exactly one computed tensor, the estimate"
        )
    return tuple(leaves), estimates[0]
