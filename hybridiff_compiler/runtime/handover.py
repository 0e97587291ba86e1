"""Handing a denoiser to the workers: a pickled skeleton without tensors, and the tensors by broadcast.

The skeleton is the module's own pickle with every tensor replaced by a number, so shared tensors stay shared and plain
tensor attributes (rotary tables) come along. Nothing is copied on the driver, and no file is read again.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ir import InputError

__all__ = ["pack_skeleton", "raw_bytes", "scramble", "unpack_skeleton"]

_INSTANCE_STATE = ("forward", "_compiled_call_impl", "_diffusers_hook", "_hf_hook", "_old_forward")
"""Attributes through which hooks replace a module's forward; capture ignores them, and they rarely pickle."""


def pack_skeleton(denoiser: nn.Module) -> tuple[bytes, list[Tensor]]:
    """The pickle of `denoiser` without its tensors, and the tensors in the order of their numbers.

    Raises:
        InputError: a class that another process cannot import, a tensor that is not plain, or an attribute that
            cannot be pickled.
    """
    for module in denoiser.modules():
        if type(module).__module__ == "__main__":
            raise InputError(
                f"{type(module).__qualname__} is defined in the running script or notebook, where worker processes "
                "cannot find it; move the class to a module that can be imported"
            )
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    try:
        pickler.dump(denoiser)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise InputError(
            f"{type(denoiser).__name__} cannot be handed to a worker process: {error}; remove hooks and attributes "
            "that cannot be pickled before calling parallelize"
        ) from error
    return stream.getvalue(), pickler.tensors


def unpack_skeleton(
    data: bytes, device: torch.device | str, tensors: Sequence[Tensor] | None = None, *,
    held: Collection[int] | None = None,
) -> tuple[nn.Module, list[Tensor]]:
    """The module, and its tensors: uninitialised ones on `device`, or the first ones of `tensors` (in the order in
    which they were packed), whose memory it then uses. `data` must come from our own driver.

    With `held` only the tensors of these numbers get memory; the others are stand-ins of one element.
    """
    unpickler = _Unpickler(io.BytesIO(data), device, tensors, held)
    return unpickler.load(), unpickler.tensors


def raw_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as 1-d bytes.

    A view when the tensor is dense (in any order of its dimensions), which is what `unpack_skeleton` makes; else a
    contiguous copy.
    """
    tensor = tensor.detach()
    if _is_dense(tensor):
        return torch.as_strided(tensor, (tensor.numel(),), (1,)).view(torch.uint8)
    return tensor.contiguous().view(-1).view(torch.uint8)


@torch.no_grad()
def scramble(tensors: Iterable[Tensor]) -> None:
    """Fill tensors with values that no compiler can make anything of."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.normal_()
        elif tensor.dtype == torch.bool:
            tensor.copy_(torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape) % 2 == 1)
        elif not tensor.is_complex():
            tensor.random_(0, 2)


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        """Tensors become `(number, shape, strides, dtype, whether a parameter, requires_grad)`."""
        if not isinstance(obj, Tensor):
            return None
        if type(obj) not in (Tensor, nn.Parameter) or obj.layout is not torch.strided or obj.is_meta:
            raise pickle.PicklingError(
                f"it holds a {type(obj).__name__} ({obj.layout}, {obj.device}); only plain dense tensors with data can "
                "be broadcast"
            )
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        strides = tuple(obj.stride()) if _is_dense(obj) else None
        is_parameter = isinstance(obj, nn.Parameter)
        return self._numbers[id(obj)], tuple(obj.shape), strides, obj.dtype, is_parameter, obj.requires_grad

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, nn.Module):
            return NotImplemented
        state = {key: value for key, value in obj.__dict__.items() if key not in _INSTANCE_STATE}
        return copyreg.__newobj__, (type(obj),), state  # type: ignore[attr-defined]


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, stream: io.BytesIO, device: torch.device | str, given: Sequence[Tensor] | None = None,
        held: Collection[int] | None = None,
    ) -> None:
        super().__init__(stream)
        self.tensors: list[Tensor] = []
        self._device, self._given = device, given
        self._held = None if held is None else frozenset(held)

    def persistent_load(self, pid: Any) -> Tensor:
        number, shape, strides, dtype, is_parameter, requires_grad = pid
        if number == len(self.tensors):
            if self._given is not None:
                tensor = self._given[number]
            elif self._held is not None and number not in self._held:
                tensor = torch.zeros((), dtype=dtype, device=self._device).expand(shape)
            elif strides is None:
                tensor = torch.empty(shape, dtype=dtype, device=self._device)
            else:
                tensor = torch.empty_strided(shape, strides, dtype=dtype, device=self._device)
            self.tensors.append(
                nn.Parameter(tensor, requires_grad=requires_grad) if is_parameter else tensor
            )
        return self.tensors[number]


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
