"""Results of hoisted parts, kept for as long as what they were made of stays what it is.

One graph may serve both branches in turn, so the results for two sets of arguments are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .for_steps import STEPS, repeated
from .hoisting import Hoisted

__all__ = ["Moment", "RecordedOnce", "RecordedTimes", "Remembered", "memory_key"]

_SETS = 2
_Recorder = Callable[[Callable[..., Sequence[Tensor]], Sequence[Tensor]], tuple[Callable[[], None], Sequence[Tensor]]]


@dataclass(frozen=True)
class Moment:
    """One step of a generation whose timesteps are known from the start."""

    timesteps: Tensor
    """`[steps]`, as the denoiser gets them, one after the other."""
    step: int

    @property
    def key(self) -> tuple[object, int] | None:
        """Equal for steps that find their results in one table, while somebody holds on to the timesteps."""
        known = memory_key(self.timesteps)
        return None if known is None else (known, self.step // STEPS)

    @property
    def row(self) -> int:
        """Of this step in its table."""
        return self.step % STEPS

    def fill(self, stacked: Tensor) -> None:
        """Write the timesteps of the table that this step is in, the last one repeated, to `[STEPS, ...]`."""
        first = self.step - self.row
        part = self.timesteps[first:first + STEPS]
        ones = (1,) * (stacked.dim() - 1)
        stacked[:len(part)].copy_(part.reshape(-1, *ones))
        stacked[len(part):].copy_(part[-1:].reshape(1, *ones))


class Remembered:
    """All parts of a stage, called as the stage is; the hoisted ones only when they have to be."""

    def __init__(self, call: Hoisted) -> None:
        self._call = call
        self._once = _Memory()
        self._timed = _Memory()

    def __call__(self, *arguments: Tensor, moment: Moment | None = None) -> Sequence[Tensor]:
        """Evaluate the stage; `moment`: which step this is, if the timesteps of all are known."""
        call, given = self._call, list(arguments)
        if call.once is not None:
            taken = [arguments[index] for index in call.once_takes]
            keys = [memory_key(argument) for argument in taken]
            given += self._once.get(keys, taken, lambda: call.once(*taken))  # type: ignore[misc]
        if call.timed is not None:
            timestep, *others = (given[index] for index in call.timed_takes)
            held = [arguments[index] for index in _steady(call, len(arguments))]
            held.append(timestep if moment is None else moment.timesteps)
            keys = [memory_key(argument) for argument in held[:-1]]
            keys.append(memory_key(timestep) if moment is None else moment.key)
            tables = self._timed.get(keys, held, lambda: call.timed(_stack(timestep, moment), *others))  # type: ignore[misc]
            given += [table[0 if moment is None else moment.row] for table in tables]
        return call.each(*given)

    def forget(self) -> None:
        """Take nothing for unchanged at the next call: weights may have been written to."""
        self._once.clear()
        self._timed.clear()


class _Memory:
    """Results by the keys of what they were made of, for the last sets of keys."""

    def __init__(self) -> None:
        self._known: list[tuple[Sequence[object], Sequence[Tensor], Sequence[Tensor]]] = []

    def get(
        self, keys: Sequence[object], held: Sequence[Tensor], compute: Callable[[], Sequence[Tensor]]
    ) -> Sequence[Tensor]:
        results = next((results for known, _, results in self._known if known == keys), None)
        if results is None or None in keys:
            results = compute()
            # The arguments are held on to, so that their memory is not handed out again.
            self._known = [*self._known[1 - _SETS:], (keys, held, results)]
        return results

    def clear(self) -> None:
        self._known.clear()


class RecordedOnce:
    """The part computed once, recorded apart; its results stay in memory of their own, which other graphs read.

    Results for a second set of arguments are kept from when it is noticed that sets alternate.
    """

    def __init__(self, call: Hoisted, inputs: Sequence[Tensor], recorder: _Recorder) -> None:
        """
        Args:
            call: all parts.
            inputs: static buffers of the stage's arguments.
            recorder: see `cuda_graph.Recorder`.
        """
        assert call.once is not None
        self.positions = frozenset(call.once_takes)
        self._order = call.once_takes
        self._replay, self._outputs = recorder(call.once, [inputs[index] for index in call.once_takes])
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


class RecordedTimes:
    """The part computed for many timesteps at a time, recorded apart, with tables of its results.

    What belongs to one step is copied from a table to memory that other graphs read.
    """

    def __init__(
        self, call: Hoisted, inputs: Sequence[Tensor], results: Sequence[Tensor], recorder: _Recorder
    ) -> None:
        """
        Args:
            call: all parts.
            inputs: static buffers of the stage's arguments.
            results: those of the part computed once.
            recorder: see `cuda_graph.Recorder`.
        """
        assert call.timed is not None
        self._steady = _steady(call, len(inputs))
        given = (*inputs, *results)
        self._timestep, *others = (given[index] for index in call.timed_takes)
        with torch.inference_mode(False), torch.no_grad():
            self._stacked = repeated(self._timestep)
            self._replay, self._outputs = recorder(call.timed, [self._stacked, *others])
            self._single = [output[0] for output in self._outputs]
            self.results = [output.clone() for output in self._single]
            self._tables = [self._new_table()]
        self._known: list[tuple[Sequence[object], Sequence[Tensor]] | None] = [None]
        self._turn = 0

    @torch.no_grad()
    def __call__(self, arguments: Sequence[Tensor], moment: Moment | None) -> None:
        """Put what belongs to `arguments`, which are in the graph's inputs by now, at `moment` into `results`."""
        if moment is None:
            self._stacked.copy_(self._timestep)
            self._replay()
            torch._foreach_copy_(self.results, self._single)
            return
        held = [arguments[index] for index in self._steady]
        keys = [*(memory_key(argument) for argument in held), moment.key]
        slot = next((slot for slot, known in enumerate(self._known) if known is not None and known[0] == keys), None)
        if slot is None or None in keys:
            slot = self._free()
            moment.fill(self._stacked)
            self._replay()
            torch._foreach_copy_(self._tables[slot][0], list(self._outputs))
            # Held on to, so that their memory is not handed out again.
            self._known[slot] = None if None in keys else (keys, [*held, moment.timesteps])
        torch._foreach_copy_(self.results, self._tables[slot][1][moment.row])

    def forget(self) -> None:
        """Compute everything anew."""
        self._known = [None] * len(self._known)
        self._turn = 0

    def _free(self) -> int:
        """Where the next table goes: an empty place, or a second one from when sets alternate, or the older of two."""
        for slot, known in enumerate(self._known):
            if known is None:
                return slot
        if len(self._tables) < _SETS:
            with torch.inference_mode(False), torch.no_grad():
                self._tables.append(self._new_table())
            self._known.append(None)
            return len(self._tables) - 1
        self._turn = (self._turn + 1) % _SETS
        return 1 - self._turn

    def _new_table(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Memory for results at `STEPS` timesteps, and by timestep its parts."""
        values = [torch.empty_like(output) for output in self._outputs]
        return values, [[value[row] for value in values] for row in range(STEPS)]


def memory_key(tensor: Tensor) -> Sequence[object] | None:
    """A key that is equal only for the same unchanged memory, while somebody holds on to it; None when that cannot be
    told."""
    if tensor.is_inference():
        return None  # inference tensors count no versions
    return (tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _steady(call: Hoisted, arguments: int) -> list[int]:
    """Positions of the stage's arguments, so many in all, that its results at any timestep depend on."""
    timestep, *others = call.timed_takes
    through_once = call.once_takes if any(index >= arguments for index in others) else ()
    return sorted({*through_once, *(index for index in others if index < arguments)} - {timestep})


def _stack(timestep: Tensor, moment: Moment | None) -> Tensor:
    """`[STEPS, ...]`: the timesteps of the table that `moment` is in, or this one, repeated."""
    stacked = repeated(timestep)
    if moment is not None:
        moment.fill(stacked)
    return stacked
