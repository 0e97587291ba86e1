"""Whether a denoiser still has the weights that the ranks of a plan were given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["LiveWeights"]

_SAMPLED = 32
"""Elements of every tensor that are compared with what they were."""


class LiveWeights:
    """Where the parameters and buffers of a denoiser lie, and which ones they are.

    Looked at once per generation, so it does without `nn.Module.parameters`, which takes several times as long.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._tensors = list(_tensors(denoiser))
        self._places = self._where()
        self._key = self._look()
        self._samples = self._sample()

    def have_moved(self) -> bool:
        """Whether the tensors lie elsewhere now, so that nothing may read the memory that they had."""
        return self._where() != self._places

    def were_written(self) -> bool:
        """Whether values were changed, told by a sample of every tensor; they must not have moved.

        Some writes no version counter knows of: those through `parameter.data`, which is how PEFT fuses a LoRA, through
        numpy, and all to tensors made in inference mode.
        """
        return not all(map(torch.equal, self._sample(), self._samples))

    def have_changed(self) -> bool:
        """Whether a parameter, buffer or submodule was replaced or edited in place (LoRA, offloading, `load`)."""
        return self._look() != self._key

    def _where(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]

    @torch.no_grad()
    def _sample(self) -> list[Tensor]:
        """Bytes of some elements of every tensor, by dtype and device."""
        parts: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for tensor in self._tensors:
            parts[tensor.dtype, tensor.device].append(_some_of(tensor))
        with torch.inference_mode(False):
            return [torch.cat(found).view(torch.uint8) for found in parts.values()]

    def _look(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        modules = [id(module) for module in _modules(self._denoiser)]
        return modules, [
            (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for tensor in _tensors(self._denoiser)
        ]


def _some_of(tensor: Tensor) -> Tensor:
    """Elements from all over a tensor, 1-d; without copying if it is contiguous."""
    if tensor.is_contiguous():
        count = tensor.numel()
        return tensor.detach().as_strided((min(count, _SAMPLED),), (max(1, count // _SAMPLED),))
    return tensor.detach()[tuple(slice(None, None, max(1, size // 4)) for size in tensor.shape)].reshape(-1)


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
