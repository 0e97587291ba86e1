"""Whether a denoiser still has the weights that the ranks of a plan were given."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

__all__ = ["LiveWeights"]


class LiveWeights:
    """Where the parameters and buffers of a denoiser lie, and which ones they are.

    Looked at once per generation, so it does without `nn.Module.parameters`, which takes several times as long.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._tensors = list(_tensors(denoiser))
        self._places = self._where()
        self._key = self._look()

    def have_moved(self) -> bool:
        """Whether the tensors lie elsewhere now, so that nothing may read the memory that they had."""
        return self._where() != self._places

    def have_changed(self) -> bool:
        """Whether a parameter, buffer or submodule was replaced or edited in place (LoRA, offloading, `load`)."""
        return self._look() != self._key

    def _where(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]

    def _look(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        modules = [id(module) for module in _modules(self._denoiser)]
        return modules, [
            (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for tensor in _tensors(self._denoiser)
        ]


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
