"""Rules for kinds of aten operations: given where the operands have their rows, how to compute it on a band of rows.

A rule answers None where the operation mixes rows in another way than it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

import torch
from torch import fx

__all__ = ["Known", "Rows", "Rule", "Split", "rule_for"]

_aten = torch.ops.aten
_Node = Any
"""An fx node, whose arguments fx types as everything that can be one."""


@dataclass(frozen=True)
class Rows:
    """Where a tensor has the rows of the image."""

    dim: int
    unit: int
    """Indices of that dimension per row of the latents."""


@dataclass(frozen=True)
class Split:
    """How an operation is computed on one band."""

    rows: Rows
    """Of the result, or of each of its parts."""
    reads: Mapping[fx.Node, Rows | None]
    """Operands: the band along these rows, or (None) the whole value."""
    kind: Literal["local", "pointwise", "conv", "norm", "upsample"] = "local"
    """`pointwise`: row i of the result needs row i of the operands and nothing else."""
    halo: int = 0
    """Indices that a convolution reads beyond the band, on each side."""
    sizes: int | None = None
    """Position of the argument that holds the sizes of the result."""


class Known(Protocol):
    """What is known of a graph when an operation is classified."""

    base: int
    """Rows of the latents."""
    varying: set[fx.Node]
    """What depends on the latents."""

    def rows(self, node: Any) -> Rows | None:
        """Where `node` is cut; None when it is whole."""


Rule = Callable[[Known, _Node], Split | None]


def rule_for(target: Any) -> Rule | None:
    """The rule for an operation, if there is one."""
    rule = _RULES.get(getattr(target, "overloadpacket", None))
    if rule is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        return _pointwise
    return rule


def _pointwise(state: Known, node: _Node) -> Split | None:
    """Operands are aligned at their last dimension; those without rows of their own are cut or broadcast."""
    value = node.meta["val"]
    cut = [(operand, state.rows(operand)) for operand in node.all_input_nodes]
    found = {(rows.dim - _dims(operand), rows.unit) for operand, rows in cut if rows is not None}
    if len(found) != 1:
        return None
    from_end, unit = found.pop()
    reads: dict[fx.Node, Rows | None] = {}
    for operand, rows in cut:
        dim = _dims(operand) + from_end
        aligned = dim >= 0 and _shape(operand)[dim] == state.base * unit and state.base * unit > 1
        reads[operand] = Rows(dim, unit) if rows is not None or aligned else None
    return Split(Rows(value.dim() + from_end, unit), reads, "pointwise")


def _conv(state: Known, node: _Node) -> Split | None:
    """Stride 1 and an output as high as the input. Also where bands begin: a whole input is cut at dimension -2."""
    operand, weight, bias, stride, padding, dilation, *rest = _arguments(node, 9)
    if node.target is _aten.convolution.default and rest[0]:
        return None  # transposed
    if isinstance(padding, str) or _dims(operand) != _dims(weight):
        return None
    rows = state.rows(operand)
    if rows is None:
        height = _shape(operand)[-2]
        if operand not in state.varying or _dims(operand) < 4 or height % state.base:
            return None
        rows = Rows(_dims(operand) - 2, height // state.base)
    axis = rows.dim - 2
    if axis < 0 or state.rows(weight) is not None:
        return None

    def at(values: Sequence[int]) -> int:
        return values[axis] if len(values) > 1 else values[0]

    reach = at(dilation) * (_shape(weight)[rows.dim] - 1)
    if at(stride) != 1 or 2 * at(padding) != reach:
        return None
    reads = {weight: None, operand: rows} | ({bias: None} if bias is not None else {})
    return Split(rows, reads, "conv", halo=at(padding))


def _group_norm(state: Known, node: _Node) -> Split | None:
    operand, rows = node.args[0], state.rows(node.args[0])
    if rows is None or rows.dim < 2:
        return None
    if isinstance(node.meta["val"], tuple) and any(user.args[1] != 0 for user in node.users):
        return None  # somebody reads the moments
    return Split(rows, {n: None for n in node.all_input_nodes} | {operand: rows}, "norm")


def _upsample(state: Known, node: _Node) -> Split | None:
    """Nearest neighbour by a whole factor."""
    operand, rows = node.args[0], state.rows(node.args[0])
    if rows is None or rows.dim < 2:
        return None
    before, after = _shape(operand)[rows.dim], node.meta["val"].shape[rows.dim]
    factors = node.args[2] if len(node.args) > 2 else None
    if isinstance(factors, (tuple, list)) and factors[rows.dim - 2] != after / before:
        return None
    if after % before or (len(node.args) > 3 and node.args[2 + rows.dim - 2] not in (None, after / before)):
        return None
    sizes = 1 if node.args[1] is not None else None
    return Split(Rows(rows.dim, rows.unit * after // before), {operand: rows}, "upsample", sizes=sizes)


def _reshape(state: Known, node: _Node) -> Split | None:
    """Rows may be joined with or parted from what comes after them, as long as they are the outer index."""
    operand, rows, after = node.args[0], state.rows(node.args[0]), node.meta["val"].shape
    if rows is None:
        return None
    before = prod(_shape(operand)[:rows.dim])
    for dim, size in enumerate(after):
        if prod(after[:dim]) == before and size % state.base == 0 and size:
            return Split(Rows(dim, size // state.base), {operand: rows}, sizes=1)
    return None


def _expand(state: Known, node: _Node) -> Split | None:
    operand, rows = node.args[0], state.rows(node.args[0])
    if rows is None:
        return None
    added = node.meta["val"].dim() - _dims(operand)
    return Split(Rows(rows.dim + added, rows.unit), {operand: rows}, sizes=1)


def _moved(place: Callable[[_Node, int], int | None]) -> Rule:
    """A rule for operations of one tensor that put dimension d at `place(node, d)`, or (None) mix it."""

    def rule(state: Known, node: _Node) -> Split | None:
        operand, rows = node.args[0], state.rows(node.args[0])
        if rows is None or any(state.rows(n) for n in node.all_input_nodes if n is not operand):
            return None
        dim = place(node, rows.dim)
        if dim is None:
            return None
        reads: dict[fx.Node, Rows | None] = dict.fromkeys(node.all_input_nodes)
        return Split(Rows(dim, rows.unit), reads | {operand: rows})

    return rule


def _transpose(node: _Node, dim: int) -> int | None:
    ends = [d % _dims(node.args[0]) for d in node.args[1:3]] if len(node.args) > 2 else [0, 1]
    return ends[1 - ends.index(dim)] if dim in ends else dim


def _permute(node: _Node, dim: int) -> int | None:
    return [d % _dims(node.args[0]) for d in node.args[1]].index(dim)


def _movedim(node: _Node, dim: int) -> int | None:
    dims = range(_dims(node.args[0]))
    return torch.empty([d + 2 for d in dims], device="meta").movedim(*node.args[1:]).shape.index(dim + 2)


def _unsqueeze(node: _Node, dim: int) -> int | None:
    return dim + (node.args[1] % (_dims(node.args[0]) + 1) <= dim)


def _squeeze(node: _Node, dim: int) -> int | None:
    dims = [d % _dims(node.args[0]) for d in _list(node.args[1])] if len(node.args) > 1 else None
    shape = _shape(node.args[0])
    gone = [d for d, size in enumerate(shape) if size == 1 and (dims is None or d in dims)]
    return None if dim in gone else dim - sum(d < dim for d in gone)


def _along(position: int, default: int | None, *, drops: bool = False) -> Callable[[_Node, int], int | None]:
    """For operations along the dimension (or dimensions) in argument `position`, which must not be the rows'."""

    def place(node: _Node, dim: int) -> int | None:
        given = _argument(node, position, "dim", default)
        if given is None or given == []:
            return None
        dims = [d % _dims(node.args[0]) for d in _list(given)]
        if dim in dims:
            return None
        before, after = _dims(node.args[0]), node.meta["val"]
        shrunk = drops and not isinstance(after, (tuple, list)) and after.dim() < before
        unbound = drops and isinstance(after, (tuple, list))
        return dim - sum(d < dim for d in dims) if shrunk or unbound else dim

    return place


def _trailing(node: _Node, dim: int) -> int | None:
    """Norms over the last dimensions."""
    return dim if dim < _dims(node.args[0]) - len(node.args[1]) else None


def _linear(node: _Node, dim: int) -> int | None:
    return dim if dim < _dims(node.args[0]) - 1 else None


def _padded(node: _Node, dim: int) -> int | None:
    pairs, pad = _dims(node.args[0]) - 1 - dim, node.args[1]
    return dim if not any(pad[2 * pairs:2 * pairs + 2]) else None


def _pixel_shuffle(state: Known, node: _Node) -> Split | None:
    operand, rows = node.args[0], state.rows(node.args[0])
    if rows is None or rows.dim != _dims(operand) - 2:
        return None
    return Split(Rows(rows.dim, rows.unit * node.args[1]), {operand: rows})


def _repeat(state: Known, node: _Node) -> Split | None:
    """`repeat_interleave` by a number."""
    operand, rows, times = node.args[0], state.rows(node.args[0]), node.args[1]
    dim = _argument(node, 2, "dim", None)
    if rows is None or not isinstance(times, int) or dim is None:
        return None
    factor = times if dim % _dims(operand) == rows.dim else 1
    return Split(Rows(rows.dim, rows.unit * factor), {operand: rows})


def _cat(state: Known, node: _Node) -> Split | None:
    operands, dim = node.args[0], _argument(node, 1, "dim", 0)
    found = {rows for operand in operands if (rows := state.rows(operand)) is not None}
    if len(found) != 1:
        return None
    rows = found.pop()
    if dim % _dims(node) == rows.dim or any(_shape(n)[rows.dim] != state.base * rows.unit for n in operands):
        return None
    return Split(rows, dict.fromkeys(operands, rows))


def _matmul(state: Known, node: _Node) -> Split | None:
    """Rows of the first factor stay; all of the second is needed for them. Or columns of the second likewise."""
    first, second = node.args[:2]
    rows, columns = state.rows(first), state.rows(second)
    if first is second or _dims(first) < 2 or _dims(second) < 2:
        return None
    if rows is not None and rows.dim == _dims(first) - 2:
        return Split(Rows(_dims(node) - 2, rows.unit), {first: rows, second: None})
    if rows is None and columns is not None and columns.dim == _dims(second) - 1:
        return Split(Rows(_dims(node) - 1, columns.unit), {first: None, second: columns})
    return None


def _attention(state: Known, node: _Node) -> Split | None:
    """Own queries, all keys and values."""
    query, key, value = node.args[:3]
    rows = state.rows(query)
    rest = [_argument(node, 3, "attn_mask", None), _argument(node, 5, "is_causal", False)]
    if rows is None or rows.dim != _dims(query) - 2 or query in (key, value) or any(rest):
        return None
    return Split(Rows(_dims(node) - 2, rows.unit), {query: rows, key: None, value: None})


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _argument(node: _Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _arguments(node: _Node, count: int) -> list[Any]:
    """Positional arguments of a convolution with its defaults."""
    defaults: list[Any] = [None, None, None, [1], [0], [1], None, None, None]
    return [*node.args, *defaults[len(node.args):]][:count]


def _shape(node: Any) -> Sequence[int]:
    return tuple(node.meta["val"].shape)


def _dims(node: Any) -> int:
    return len(_shape(node))


_SAME = (
    _aten.to, _aten._to_copy, _aten.clone, _aten.contiguous, _aten.detach, _aten.alias, _aten.lift_fresh_copy,
    _aten.expand_as,
)
_RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(_SAME, _pointwise),
    **dict.fromkeys((_aten.conv2d, _aten.conv3d, _aten.convolution), _conv),
    **dict.fromkeys((_aten.group_norm, _aten.native_group_norm), _group_norm),
    **dict.fromkeys((_aten.upsample_nearest2d, _aten.upsample_nearest3d), _upsample),
    **dict.fromkeys((_aten.reshape, _aten.view, _aten._unsafe_view), _reshape),
    **dict.fromkeys((_aten.transpose, _aten.t), _moved(_transpose)),
    **dict.fromkeys((_aten.softmax, _aten._softmax), _moved(_along(1, None))),
    **dict.fromkeys(
        (_aten.mean, _aten.sum, _aten.amax, _aten.amin, _aten.var), _moved(_along(1, None, drops=True))),
    **dict.fromkeys((_aten.split, _aten.split_with_sizes, _aten.chunk), _moved(_along(2, 0))),
    **dict.fromkeys((_aten.layer_norm, _aten.rms_norm), _moved(_trailing)),
    **dict.fromkeys((_aten.constant_pad_nd, _aten.pad), _moved(_padded)),
    **dict.fromkeys((_aten.matmul, _aten.bmm), _matmul),
    _aten.linalg_vector_norm: _moved(_along(2, None, drops=True)),
    _aten.slice: _moved(_along(1, 0)),
    _aten.narrow: _moved(_along(1, None)),
    _aten.select: _moved(_along(1, None, drops=True)),
    _aten.unbind: _moved(_along(1, 0, drops=True)),
    _aten.permute: _moved(_permute),
    _aten.movedim: _moved(_movedim),
    _aten.unsqueeze: _moved(_unsqueeze),
    _aten.squeeze: _moved(_squeeze),
    _aten.linear: _moved(_linear),
    _aten.expand: _expand,
    _aten.pixel_shuffle: _pixel_shuffle,
    _aten.repeat_interleave: _repeat,
    _aten.cat: _cat,
    _aten.scaled_dot_product_attention: _attention,
}
"""By overload packet; operations that torch tags as pointwise need no entry."""
