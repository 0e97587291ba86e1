"""Results of a hoisted part, kept for as long as its arguments stay what they are.

One graph may serve both branches in turn, so the results for two sets of arguments are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .hoisting import Hoisted

__all__ = ["RecordedOnce", "RememberedOnce", "memory_key"]

_SETS = 2


class RememberedOnce:
    """Both parts of a stage, called as the stage is; the hoisted one only when it has to be."""

    def __init__(self, call: Hoisted) -> None:
        self._call = call
        self._known: list[tuple[Sequence[object], Sequence[Tensor], Sequence[Tensor]]] = []

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """Evaluate the stage."""
        taken = [arguments[index] for index in self._call.positions]
        keys = [memory_key(argument) for argument in taken]
        results = next((results for known, _, results in self._known if known == keys), None)
        if results is None or None in keys:
            results = self._call.once(*taken)
            # The arguments are held on to, so that their memory is not handed out again.
            self._known = [*self._known[1 - _SETS:], (keys, taken, results)]
        return self._call.each(*arguments, *results)

    def forget(self) -> None:
        """Take nothing for unchanged at the next call: weights may have been written to."""
        self._known.clear()


class RecordedOnce:
    """The hoisted part, recorded apart; its results stay in memory of their own, which the other part's graph reads.

    Results for a second set of arguments are kept from when it is noticed that sets alternate.
    """

    def __init__(
        self, call: Hoisted, inputs: Sequence[Tensor],
        recorder: Callable[[Callable[..., Sequence[Tensor]], Sequence[Tensor]],
                           tuple[Callable[[], None], Sequence[Tensor]]],
    ) -> None:
        """
        Args:
            call: both parts.
            inputs: static buffers of the stage's arguments.
            recorder: see `cuda_graph.Recorder`.
        """
        self.positions = frozenset(call.positions)
        self._order = call.positions
        self._replay, self._outputs = recorder(call.once, [inputs[index] for index in call.positions])
        with torch.inference_mode(False), torch.no_grad():
            self.results = [output.clone() for output in self._outputs]
        self._kept: list[list[Tensor]] = []
        self._known: dict[int, tuple[Sequence[object], Sequence[Tensor]]] = {}
        self._computed = 0

    def __call__(self, arguments: Sequence[Tensor]) -> None:
        """Put what belongs to `arguments`, which are in the graph's inputs by now, into `results`."""
        taken = [arguments[index] for index in self._order]
        keys = [memory_key(argument) for argument in taken]
        slot = next((slot for slot, (known, _) in self._known.items() if known == keys), None)
        if slot is not None and None not in keys:
            torch._foreach_copy_(self.results, self._kept[slot])
            return
        self._replay()
        torch._foreach_copy_(self.results, list(self._outputs))
        if self._computed:
            slot = (self._computed - 1) % _SETS
            if slot == len(self._kept):
                with torch.inference_mode(False):
                    self._kept.append([torch.empty_like(result) for result in self.results])
            torch._foreach_copy_(self._kept[slot], self.results)
            self._known[slot] = keys, taken  # held on to, so that their memory is not handed out again
        self._computed += 1

    def forget(self) -> None:
        """Compute everything anew."""
        self._known.clear()
        self._computed = 0


def memory_key(tensor: Tensor) -> Sequence[object] | None:
    """A key that is equal only for the same unchanged memory, while somebody holds on to it; None when that cannot be
    told."""
    if tensor.is_inference():
        return None  # inference tensors count no versions
    return (tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.stride(), tensor.dtype)
