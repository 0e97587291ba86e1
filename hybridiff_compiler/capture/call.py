"""Flattening one call of a denoiser: which tensors it gets, and which constants are baked into its graph."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..ir.errors import InputError, UsageError
from ..ir.signature import CallSignature, LeafSpec

__all__ = ["TIMESTEP", "CallSignature", "LeafSpec", "bind_call", "flatten_call", "iter_leaves", "steady_leaves",
           "step_parameters", "unflatten_call"]

TIMESTEP = "timestep"
"""Name of the parameter of a denoiser's forward that takes the timestep."""

_SCALARS = (bool, int, float, complex, str, bytes, type(None))


def flatten_call(
    denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[CallSignature, dict[str, torch.Tensor]]:
    """Describe one call of `denoiser` and name its tensors.

    Arguments are bound to the signature of the class's own `forward` (a hooked or patched instance is read as its
    class declares it), and arguments equal to their default are dropped, so that spelling out a default changes
    nothing.

    Returns:
        The signature, and the tensors by leaf path; both in the order of the forward signature, with the entries of
        nested dicts sorted by key.

    Raises:
        UsageError: the arguments do not fit the forward signature.
    """
    leaves: list[LeafSpec] = []
    tensors: dict[str, torch.Tensor] = {}
    for path, leaf in iter_leaves(bind_call(denoiser, args, kwargs)):
        if isinstance(leaf, torch.Tensor):
            tensors[path] = leaf
            leaves.append(LeafSpec(path=path, shape=tuple(leaf.shape), dtype=dtype_name(leaf.dtype)))
        else:
            leaves.append(LeafSpec(path=path, constant=_constant(leaf)))
    return CallSignature(leaves=tuple(leaves)), tensors


def bind_call(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call as keyword arguments in signature order, without those equal to their default.

    Raises:
        UsageError: the arguments do not fit the forward signature, or the denoiser takes `*args`.
    """
    signature = forward_signature(denoiser)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"{type(denoiser).__name__} cannot be called like this: {error}; its forward takes "
            f"({', '.join(signature.parameters)})"
        ) from None
    result: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            result.update(sorted(value.items()))
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            if value:
                raise UsageError(
                    f"{type(denoiser).__name__}.forward got {len(value)} unnamed extra arguments; pass them by keyword"
                )
        elif not _is_default(value, parameter.default):
            result[name] = value
    return result


def forward_signature(denoiser: nn.Module) -> inspect.Signature:
    """Signature of the `forward` of the denoiser's class, without `self`."""
    return _signature(type(denoiser).forward)


@functools.lru_cache(maxsize=64)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def step_parameters(denoiser: nn.Module) -> tuple[str, str]:
    """Names of the forward's parameters that take the latents (the first one) and the timestep."""
    return next(iter(forward_signature(denoiser).parameters)), TIMESTEP


def steady_leaves(denoiser: nn.Module, paths: Iterable[str]) -> tuple[str, ...]:
    """Those of these leaf paths that as a rule stay the same from step to step: all but latents and timestep."""
    changing = step_parameters(denoiser)
    return tuple(path for path in paths if path.partition(".")[0] not in changing)


def iter_leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """`(path, leaf)` of nested dicts (by sorted key), lists and tuples.

    An empty container is a leaf, and so is a list or tuple of plain numbers, texts or such lists (image shapes).
    """
    if path and _is_plain(tree):
        yield path, tree
    elif isinstance(tree, Mapping) and tree:
        # The call itself keeps signature order; nested dicts are sorted, so insertion order does not matter.
        keys = list(tree) if not path else sorted(tree, key=str)
        for key in keys:
            yield from iter_leaves(tree[key], f"{path}.{key}" if path else str(key))
    elif isinstance(tree, (list, tuple)) and tree:
        for index, item in enumerate(tree):
            yield from iter_leaves(item, f"{path}.{index}")
    elif path:
        yield path, tree


def unflatten_call(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments from `path -> leaf`, the inverse of `iter_leaves`; tuples that hold tensors become lists."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        target = tree
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = leaf
    return {name: _with_lists(value) for name, value in tree.items()}


def _with_lists(tree: Any) -> Any:
    if not isinstance(tree, dict) or not tree:
        return tree
    values = {key: _with_lists(value) for key, value in tree.items()}
    if set(values) == {str(index) for index in range(len(values))}:
        return [values[str(index)] for index in range(len(values))]
    return values


def _is_plain(tree: Any) -> bool:
    if isinstance(tree, (list, tuple)):
        return all(_is_plain(item) or isinstance(item, _SCALARS) for item in tree)
    return False


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """Inverse of `dtype_name`.

    Raises:
        InputError: torch has no dtype of this name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{name!r} is not a torch dtype; use one like 'float32', 'float16' or 'bfloat16'")
    return dtype


def _is_default(value: Any, default: Any) -> bool:
    if value is default:
        return True
    return isinstance(value, _SCALARS) and type(value) is type(default) and value == default


def _constant(leaf: Any) -> str:
    """`repr` where it is stable from run to run, else the type's name in angle brackets."""
    if isinstance(leaf, (*_SCALARS, dict, list, tuple, torch.dtype, torch.device)):
        return repr(leaf)
    return f"<{type(leaf).__module__}.{type(leaf).__qualname__}>"
