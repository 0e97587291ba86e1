"""Flattening one call of a denoiser: which tensors it gets, and which constants are baked into its graph."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..ir.data import Data
from ..ir.errors import InputError, UsageError

__all__ = ["CallSignature", "LeafSpec", "bind_call", "flatten_call", "iter_leaves"]

_SCALARS = (bool, int, float, complex, str, bytes, type(None))


class LeafSpec(Data):
    """One leaf of a call: a tensor's shape and dtype, or the `repr` of a constant."""

    path: str
    """Forward-signature name, with `.key` or `.index` per nested container: `added_cond_kwargs.text_embeds`."""
    shape: tuple[int, ...] | None = None
    """None for constants."""
    dtype: str | None = None
    """torch dtype without the `torch.` prefix; None for constants."""
    constant: str | None = None
    """`repr` of a leaf that is not a tensor; None for tensors."""

    def __str__(self) -> str:
        if self.constant is not None:
            return f"{self.path}={self.constant}"
        return f"{self.path}: {self.dtype}{list(self.shape or ())}"


class CallSignature(Data):
    """All leaves of one call, in the order of the forward signature; equal signatures share one captured graph."""

    leaves: tuple[LeafSpec, ...]

    def mismatch(self, other: CallSignature) -> str | None:
        """One line naming the first leaf in which `other` (the call at hand) differs; None if the two are equal."""
        if self.leaves == other.leaves:
            return None
        mine, theirs = ({leaf.path: leaf for leaf in side.leaves} for side in (self, other))
        for path, leaf in mine.items():
            if path not in theirs:
                return f"captured with {leaf}, which this call does not pass"
            if theirs[path] != leaf:
                return f"captured with {leaf}, called with {theirs[path]}"
        extra = next((leaf for path, leaf in theirs.items() if path not in mine), None)
        return f"called with {extra}, which was not captured" if extra else "leaves are in another order"


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
    signature = forward_signature(type(denoiser))
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


@functools.lru_cache(maxsize=64)
def forward_signature(denoiser_class: type[nn.Module]) -> inspect.Signature:
    """Signature of the class's `forward`, without `self`."""
    signature = inspect.signature(denoiser_class.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def iter_leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """`(path, leaf)` of nested dicts (by sorted key), lists and tuples; an empty container is a leaf."""
    if isinstance(tree, Mapping) and tree:
        # The call itself keeps signature order; nested dicts are sorted, so insertion order does not matter.
        keys = list(tree) if not path else sorted(tree, key=str)
        for key in keys:
            yield from iter_leaves(tree[key], f"{path}.{key}" if path else str(key))
    elif isinstance(tree, (list, tuple)) and tree:
        for index, item in enumerate(tree):
            yield from iter_leaves(item, f"{path}.{index}")
    elif path:
        yield path, tree


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
