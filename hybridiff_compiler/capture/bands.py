"""From a classified decoder to what one rank computes: graphs of its band, and what it exchanges between them.

The program of a rank is a list of phases. A phase is one graph without communication; at its end values are sent to
other ranks and received from them, and the next phase goes on. All ranks have the same phases, so that both ends of a
message know of it without a word.

What a convolution reads beyond the band is not fetched where the convolution stands but as early as possible: before
the norm, the activation and the upsampling in front of it, whose extra rows are cheaper to repeat than to send. So the
halo travels together with the moments that the norm needs, and a residual block takes two messages per neighbour.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.errors import UsageError
from .phases import Parcel, Phase, PhaseBuilder
from .row_rules import Rows, Split
from .rows import RowGraph

__all__ = ["BandProgram", "Parcel", "Phase", "band_bounds", "band_program"]

_aten = torch.ops.aten
_SHARES = "hybridiff_band_shares"


@dataclass(frozen=True)
class BandProgram:
    """What one rank computes of a decode."""

    LATENTS = "latents"
    """Name of the input."""
    rank: int
    phases: tuple[Phase, ...]
    result: str
    """Name of the value that is this rank's part of the image."""
    rows: tuple[int, int, int] | None
    """Dimension, begin and end of that part in the whole image; None: it is the whole image, on every rank."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the result."""

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank sends to others during one decode."""
        return sum(
            torch.Size(shape).numel() * dtype.itemsize
            for phase in self.phases for parcel in phase.sends for shape, dtype in parcel.specs
        )


def band_bounds(base: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """First and last row (exclusive) of every rank's band of `base` rows; later ranks have the odd ones.

    Raises:
        UsageError: fewer rows than ranks.
    """
    if ranks < 1 or base < ranks:
        raise UsageError(f"{base} rows of latents cannot be cut into {ranks} bands; use fewer ranks, or taller images")
    sizes = [base // ranks + (ranks - rank <= base % ranks) for rank in range(ranks)]
    return tuple(pairwise(accumulate(sizes, initial=0)))


def band_program(graph: RowGraph, rank: int, ranks: int, *, channels_last: bool = False) -> BandProgram:
    """The program of one of `ranks` ranks.

    Args:
        graph: the classified decoder; its parameters are used by reference.
        rank, ranks: which one.
        channels_last: keep images in memory with the channels innermost, which GPUs convolve faster.

    Raises:
        UsageError: a band is smaller than the halo of a convolution.
    """
    bounds = band_bounds(graph.base, ranks)
    return _Lowering(graph, rank, bounds, channels_last).program()


class _Lowering:
    """One rank's program under construction; every rank visits the same nodes in the same order."""

    def __init__(
        self, graph: RowGraph, rank: int, bounds: Sequence[tuple[int, int]], channels_last: bool
    ) -> None:
        self._source, self._rank, self._bounds, self._channels_last = graph, rank, bounds, channels_last
        self._own = bounds[rank]
        self._builder = PhaseBuilder(graph.exported.module)
        self._emit = self._builder.emit
        self._local: dict[fx.Node, fx.Node] = {}
        """The band of nodes that are split, the whole value of all others."""
        self._gathered: dict[fx.Node, fx.Node] = {}
        self._extended: dict[tuple[fx.Node, int], fx.Node] = {}
        self._scales: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

    def program(self) -> BandProgram:
        """Build everything."""
        source = self._source.exported.module.graph
        for node in source.nodes:
            if node.op == "placeholder":
                self._local[node] = self._in_layout(self._builder.input(BandProgram.LATENTS, node.meta["val"]))
            elif node.op == "get_attr":
                self._local[node] = self._builder.parameter(node.target)
            elif node.op == "call_function":
                self._visit(node)
        (estimate,) = source.output_node().all_input_nodes
        result, rows = self._local[estimate], None
        if (split := self._source.splits.get(estimate)) is not None:
            begin, end = self._own
            rows = (split.rows.dim, begin * split.rows.unit, end * split.rows.unit)
        value = result.meta["val"]
        phases = self._builder.phases(result)
        return BandProgram(self._rank, phases, result.name, rows, tuple(value.shape), value.dtype)

    def _visit(self, node: fx.Node) -> None:
        split = self._source.splits.get(node)
        if split is None or (len(self._bounds) == 1 and not self._is_rewritten(node)):
            self._local[node] = self._copy(node, self._whole)
        elif node.target is operator.getitem and self._source.splits[node.args[0]].kind == "norm":  # type: ignore[index]
            self._local[node] = self._local[node.args[0]]  # type: ignore[index]
        elif split.kind == "conv" and split.halo:
            self._local[node] = self._convolve(node, split)
        elif split.kind == "norm":
            operand = node.args[0]
            assert isinstance(operand, fx.Node)
            self._local[node] = self._normalise(node, self._band(operand, split.reads[operand]))
        else:
            self._local[node] = self._copy(node, lambda n: self._operand(n, split), split)

    def _is_rewritten(self, node: fx.Node) -> bool:
        """Whether one rank alone gets a norm as several operations: torch's own wants the channels outermost."""
        source: Any = node.args[0] if node.target is operator.getitem else node
        return self._channels_last and source in self._source.splits and self._source.splits[source].kind == "norm"

    def _operand(self, node: fx.Node, split: Split) -> fx.Node:
        rows = split.reads.get(node)
        return self._whole(node) if rows is None else self._band(node, rows)

    def _band(self, node: fx.Node, rows: Rows | None) -> fx.Node:
        """This rank's rows of a value."""
        if node in self._source.splits:
            return self._local[node]
        assert rows is not None
        return self._rows_of_whole(node, rows, 0)

    def _rows_of_whole(self, node: fx.Node, rows: Rows, halo: int) -> fx.Node:
        first, last = self._reach(rows, halo)
        return self._emit(_aten.slice.Tensor, self._local[node], rows.dim, first, last)

    def _reach(self, rows: Rows, halo: int) -> tuple[int, int]:
        """The band with a halo, within the image."""
        begin, end = self._own
        return max(0, begin * rows.unit - halo), min(self._source.base * rows.unit, end * rows.unit + halo)

    def _whole(self, node: fx.Node) -> fx.Node:
        """All rows of a value, on every rank."""
        split = self._source.splits.get(node)
        if split is None or len(self._bounds) == 1:
            return self._local[node]
        if node not in self._gathered:
            own, rows = self._local[node], split.rows
            parts = []
            for peer, (begin, end) in enumerate(self._bounds):
                if peer == self._rank:
                    parts.append(own)
                    continue
                shape = list(own.meta["val"].shape)
                shape[rows.dim] = (end - begin) * rows.unit
                parts.append(self._builder.swap(own, peer, own, shape))
            self._gathered[node] = self._emit(_aten.cat.default, parts, rows.dim)
        return self._gathered[node]

    def _extend(self, node: fx.Node, rows: Rows, halo: int) -> fx.Node:
        """The band of a value with `halo` more rows on each side, as far as the image goes."""
        key = node, halo
        if key not in self._extended:
            self._extended[key] = self._extension(node, rows, halo)
        return self._extended[key]

    def _extension(self, node: fx.Node, rows: Rows, halo: int) -> fx.Node:
        split = self._source.splits.get(node)
        if split is None:
            return self._rows_of_whole(node, rows, halo)
        if len(node.users) == 1 and (through := self._pass_through(node, split)) is not None:
            operand, before = through
            if split.kind == "norm":
                return self._normalise(node, self._extend(operand, before, halo))
            if split.kind == "upsample":
                factor = split.rows.unit // before.unit
                wider = self._extend(operand, before, -(-halo // factor))
                larger = self._copy(node, {operand: wider}.__getitem__, split, wider)
                first, last = self._reach(rows, halo)
                offset = self._reach(before, -(-halo // factor))[0] * factor
                return self._emit(_aten.slice.Tensor, larger, rows.dim, first - offset, last - offset)
            wider = self._extend(operand, before, halo)
            return self._copy(
                node, lambda n: wider if n is operand else self._operand(n, split), split, wider
            )
        return self._fetch(node, rows, halo)

    def _pass_through(self, node: fx.Node, split: Split) -> tuple[fx.Node, Rows] | None:
        """The one operand with rows of an operation that is cheap to repeat on a halo."""
        if split.kind not in ("pointwise", "norm", "upsample") or not isinstance(node.meta["val"], Tensor):
            return None
        cut = [(operand, rows) for operand, rows in split.reads.items() if rows is not None]
        return cut[0] if len(cut) == 1 else None

    def _fetch(self, node: fx.Node, rows: Rows, halo: int) -> fx.Node:
        """The halo from the neighbours."""
        smallest = min(end - begin for begin, end in self._bounds) * rows.unit
        if smallest < halo:
            raise UsageError(
                f"a band of {smallest} rows is smaller than the {halo} rows that {node.name} passes to its neighbours; "
                f"use fewer than {len(self._bounds)} ranks, or taller images"
            )
        own = self._local[node]
        size = own.meta["val"].shape[rows.dim]
        parts = [own]
        for peer in (self._rank - 1, self._rank + 1):
            if 0 <= peer < len(self._bounds):
                first = 0 if peer < self._rank else size - halo
                edge = self._emit(_aten.slice.Tensor, own, rows.dim, first, first + halo)
                # A copy, so that what is kept for sending does not keep the memory of the whole band.
                edge = self._emit(_aten.clone.default, edge, memory_format=torch.contiguous_format)
                arrived = self._in_layout(self._builder.swap(own, peer, edge, tuple(edge.meta["val"].shape)))
                parts = [arrived, *parts] if peer < self._rank else [*parts, arrived]
        return self._emit(_aten.cat.default, parts, rows.dim)

    def _convolve(self, node: fx.Node, split: Split) -> fx.Node:
        """On the band with its halo; rows that saw zeros in place of rows of the image are dropped."""
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        rows = split.reads[operand]
        assert rows is not None
        wider = self._extend(operand, rows, split.halo)
        result = self._copy(node, lambda n: wider if n is operand else self._operand(n, split), split, wider)
        begin, end = self._own[0] * rows.unit, self._own[1] * rows.unit
        first, _ = self._reach(rows, split.halo)
        if (first, end - first) == (begin, result.meta["val"].shape[rows.dim]):
            return result
        return self._emit(_aten.slice.Tensor, result, rows.dim, begin - first, end - first)

    def _normalise(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """A group norm of some rows, by the moments of all."""
        scale, shift = self._scale(node)
        result = self._emit(_aten.addcmul.default, shift, self._emit(_aten.to.dtype, value, _accumulated(value)), scale)
        out = node.meta["val"]
        return self._emit(_aten.to.dtype, result, (out[0] if isinstance(out, tuple) else out).dtype)

    def _scale(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What a group norm multiplies with and adds, per channel.

        Every rank sends mean and variance of its band, computed in float32; they are combined exactly (Chan et al.
        1979): the mean of means, and the mean of variances plus the variance of the means, weighted by band size.
        """
        if node in self._scales:
            return self._scales[node]
        operand, groups, weight, bias, eps = _norm_arguments(node)
        own = self._local[operand]
        shape = tuple(own.meta["val"].shape)
        channels = (shape[0], groups, shape[1] // groups)
        wide = self._emit(_aten.to.dtype, own, _accumulated(own))
        grouped = self._emit(_aten.reshape.default, wide, [*channels, *shape[2:]])
        moments = self._emit(_aten.var_mean.correction, grouped, list(range(2, len(shape) + 1)), correction=0)
        variance, mean = (self._emit(operator.getitem, moments, index) for index in (0, 1))
        stacked = self._emit(_aten.stack.default, [mean, variance])
        bands = [
            stacked if peer == self._rank else
            self._builder.swap(stacked, peer, stacked, tuple(stacked.meta["val"].shape))
            for peer in range(len(self._bounds))
        ]
        every = self._emit(_aten.stack.default, bands)
        share = self._shares(own)
        means, variances = (self._emit(_aten.select.int, every, 1, index) for index in (0, 1))
        mean = self._emit(_aten.sum.dim_IntList, self._emit(_aten.mul.Tensor, means, share), [0])
        apart = self._emit(_aten.sub.Tensor, means, mean)
        spread = self._emit(_aten.addcmul.default, variances, apart, apart)
        variance = self._emit(_aten.sum.dim_IntList, self._emit(_aten.mul.Tensor, spread, share), [0])
        inverse = self._emit(_aten.rsqrt.default, self._emit(_aten.add.Tensor, variance, eps))

        def per_channel(grouped: fx.Node) -> fx.Node:
            wide = self._emit(_aten.expand.default, self._emit(_aten.unsqueeze.default, grouped, 2), list(channels))
            return self._emit(_aten.reshape.default, wide, [shape[0], shape[1], *[1] * (len(shape) - 2)])

        scale, mean = per_channel(inverse), per_channel(mean)
        if weight is not None:
            scale = self._emit(_aten.mul.Tensor, scale, self._affine(weight, len(shape)))
        shift = self._emit(_aten.neg.default, self._emit(_aten.mul.Tensor, mean, scale))
        if bias is not None:
            shift = self._emit(_aten.add.Tensor, shift, self._affine(bias, len(shape)))
        self._scales[node] = scale, shift
        return scale, shift

    def _affine(self, parameter: fx.Node, dims: int) -> fx.Node:
        return self._emit(_aten.reshape.default, self._whole(parameter), [1, -1, *[1] * (dims - 2)])

    def _shares(self, value: fx.Node) -> fx.Node:
        """[ranks, 1, 1]: every band's part of the image."""
        dtype = _accumulated(value)
        name = f"{_SHARES}_{str(dtype).removeprefix('torch.')}"
        shares = torch.tensor([(end - begin) / self._source.base for begin, end in self._bounds], dtype=dtype)
        device = next(iter(self._source.exported.module.parameters())).device
        return self._builder.constant(name, shares[:, None, None].to(device))

    def _copy(
        self, node: fx.Node, operand: Callable[[fx.Node], fx.Node], split: Split | None = None,
        like: fx.Node | None = None,
    ) -> fx.Node:
        """The operation on other operands; sizes among its arguments follow the rows of `like` (default: the band)."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        if split is not None and split.sizes is not None:
            whole = node.meta["val"].shape
            begin, end = self._own
            count = (end - begin) * split.rows.unit
            if like is not None:
                (before,) = (rows for rows in split.reads.values() if rows is not None)
                count = like.meta["val"].shape[before.dim] * split.rows.unit // before.unit
            sizes = [count if dim == split.rows.dim else size for dim, size in enumerate(whole)]
            sizes = sizes[2:] if split.kind == "upsample" else sizes
            args = (*args[:split.sizes], sizes, *args[split.sizes + 1:])
        assert callable(node.target)
        return self._emit(node.target, *args, **kwargs)

    def _in_layout(self, node: fx.Node) -> fx.Node:
        """Images arrive contiguous; what follows keeps the layout that they are given here."""
        if self._channels_last and node.meta["val"].dim() == 4:
            return self._emit(_aten.clone.default, node, memory_format=torch.channels_last)
        return node

def _accumulated(value: fx.Node) -> torch.dtype:
    """The dtype that moments are computed in."""
    return torch.promote_types(value.meta["val"].dtype, torch.float32)


def _norm_arguments(node: fx.Node) -> tuple[fx.Node, int, fx.Node | None, fx.Node | None, float]:
    """Input, groups, weight, bias and epsilon of either form of a group norm."""
    args: list[Any] = list(node.args)
    if node.target is _aten.native_group_norm.default:
        return args[0], args[6], args[1], args[2], args[7]
    args += [None, None, 1e-5][len(args) - 2:] if len(args) < 5 else []
    weight, bias, eps = (node.kwargs.get(name, args[at]) for at, name in ((2, "weight"), (3, "bias"), (4, "eps")))
    return args[0], args[1], weight, bias, eps
