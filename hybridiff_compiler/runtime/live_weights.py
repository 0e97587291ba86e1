"""Whether a denoiser still has the weights and settings that the ranks of a plan were given."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LiveWeights"]

_SAMPLED = 16
"""Elements of every tensor that are compared with what they were."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element."""
_NO_SETTINGS = {"training", "forward", "gradient_checkpointing"}
_PLAIN = (bool, int, float, str)


class LiveWeights:
    """Where the parameters and buffers of a denoiser lie, which ones they are, a sample of their values, and the plain
    settings of its modules, which are constants of the captured graph.

    Looked at once per generation, so it does without `nn.Module.parameters`, which takes several times as long.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._tensors = list(_tensors(denoiser))
        self._places = self._where()
        self._key = self._look()
        self._settings = _settings(denoiser)
        self._spread = [_spread(tensor) for tensor in self._tensors]
        devices = dict.fromkeys(tensor.device for tensor in self._tensors if tensor.is_cuda)
        # Of high priority: what is compared while a step runs shall not wait for that step.
        self._streams = {device: torch.cuda.Stream(device, priority=-1) for device in devices}
        self._begun = {device: torch.cuda.Event() for device in devices}
        self._samples = self._sample()

    def have_moved(self) -> bool:
        """Whether the tensors lie elsewhere now, so that nothing may read the memory that they had."""
        self._mark()
        return self._where() != self._places

    def have_changed(self) -> bool:
        """Whether a parameter, buffer or submodule was replaced or edited in place (LoRA, offloading, `load`) by when
        `have_moved` was asked last, which was answered with no; or a setting was (FreeU, scales of adapters, attention
        processors).

        Of some writes no version counter knows: those through `parameter.data`, which is how PEFT fuses a LoRA, through
        numpy, and all to tensors made in inference mode. So some values of every tensor are compared, too, beside what
        the devices have been given to do since.
        """
        return (
            self._look() != self._key or _settings(self._denoiser) != self._settings or not self._samples_equal()
        )

    def _mark(self) -> None:
        for device, event in self._begun.items():
            event.record(torch.cuda.current_stream(device))

    def _where(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]

    def _samples_equal(self) -> bool:
        with self._aside():
            return all(map(torch.equal, self._sample(), self._samples))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Streams of our own, which go on from where the devices' queues stood at the last `_mark`."""
        with ExitStack() as stack:
            for device, stream in self._streams.items():
                stream.wait_event(self._begun[device])
                stack.enter_context(torch.cuda.stream(stream))
            yield

    @torch.no_grad()
    def _sample(self) -> list[Tensor]:
        """Some elements of every tensor as integers (of which all equal themselves), by dtype and device."""
        parts: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for tensor, (size, stride) in zip(self._tensors, self._spread):
            found = tensor.as_strided(size, stride)
            parts[tensor.dtype, tensor.device].append(found if len(size) == 1 else found.reshape(-1))
        with torch.inference_mode(False):
            return [
                torch.cat(found).view(_INTEGERS.get(dtype.itemsize, torch.uint8)) for (dtype, _), found in parts.items()
            ]

    def _look(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        modules = [id(module) for module in _modules(self._denoiser)]
        return modules, [
            (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for tensor in _tensors(self._denoiser)
        ]


def _spread(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Size and stride of a view of elements from all over a tensor: in one dimension if it has no gaps in memory."""
    count, expected = tensor.numel(), 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride()), key=lambda pair: pair[1]):
        if size != 1 and stride != expected:
            steps = [max(1, size // 4) for size in tensor.shape]
            return (
                tuple(-(-size // step) for size, step in zip(tensor.shape, steps)),
                tuple(stride * step for stride, step in zip(tensor.stride(), steps)),
            )
        expected *= size
    step = max(1, count // _SAMPLED)
    while math.gcd(step, count) > 1:  # a divisor would pick the same column of every row
        step -= 1
    return (min(count, _SAMPLED),), (max(1, step),)


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    queue = [module]
    while queue:
        found = queue.pop()
        yield found
        queue.extend(child for child in found._modules.values() if child is not None)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for found in _modules(module):
        for tensors in (found._parameters, found._buffers):
            if tensors:
                yield from (tensor for tensor in tensors.values() if tensor is not None)


def _settings(denoiser: nn.Module) -> list[tuple[Any, ...]]:
    """Classes and plain attributes of all modules and of the objects that they hold, such as attention processors."""
    return [(type(module), *_own_settings(module.__dict__, 1)) for module in _modules(denoiser)]


def _own_settings(attributes: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    for name, value in attributes.items():
        # What is None may as well be absent: that is how diffusers takes settings back.
        if name[0] == "_" or value is None or name in _NO_SETTINGS:
            continue
        if isinstance(value, _PLAIN):
            yield name, value
        elif isinstance(value, (list, tuple, dict)):
            if (plain := _plain(value)) is not None:
                yield name, plain
        elif isinstance(value, (nn.Module, Tensor)):
            continue
        elif depth and hasattr(value, "__dict__") and not hasattr(value, "__qualname__"):  # neither class nor function
            yield name, (type(value), *_own_settings(value.__dict__, depth - 1))


def _plain(value: Any) -> Any:
    """A copy of plain values in lists, tuples and dicts; None if there is anything else in it (caches, say)."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return None if None in items else tuple(items)
    if isinstance(value, dict):
        values = {key: _plain(item) for key, item in value.items()}
        return None if None in values.values() else values
    return None
