"""Which pattern each step runs: read off a fixed schedule, or decided while generating."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir import Branch, FixedSchedule, Schedule, SwitchedSchedule

__all__ = ["ScheduleState", "discrepancy"]


def discrepancy(pair: Mapping[Branch, Tensor]) -> Tensor:
    """m = mean|eps_c - eps_u| / mean|eps_u| as a 0-d fp32 tensor on the pair's device (METHOD.md, "rel-MAE")."""
    uncond, cond = pair["uncond"].float(), pair["cond"].float()
    return (cond - uncond).abs().mean() / uncond.abs().mean()


@dataclass(frozen=True)
class _Pending:
    """A discrepancy on its way from the device."""

    value: Tensor
    event: torch.cuda.Event | None

    def read(self) -> float:
        if self.event is not None:
            self.event.synchronize()
        return float(self.value)


class ScheduleState:
    """The schedule of one generation.

    For schedules that are found while generating the discrepancy is computed on the device and copied without waiting;
    `pattern_at` reads a value only when `lag` steps have passed, so that with a lag of 2 the copy has had a whole step
    to finish.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._pending: dict[int, _Pending] = {}
        self._known: list[float] = []
        self._decided: FixedSchedule | None = None
        self._undecided = schedule if isinstance(schedule, FixedSchedule) else schedule.undecided
        self.reset()

    def reset(self) -> None:
        """A generation begins."""
        self._pending.clear()
        self._known.clear()
        self._decided = self.schedule if isinstance(self.schedule, FixedSchedule) else None

    @property
    def discrepancies(self) -> tuple[float, ...]:
        """The values read so far."""
        return tuple(self._known)

    @property
    def is_settled(self) -> bool:
        """Whether the patterns of all remaining steps are known."""
        return self._decided is not None

    def next_is_known(self, step: int) -> bool:
        """Whether the pattern of `step` can be told before the step before it has finished."""
        schedule = self.schedule
        return self._decided is not None or isinstance(schedule, FixedSchedule) or schedule.lag >= 2

    def pattern_at(self, step: int) -> str:
        """Name of the pattern of `step`; asked in increasing order, after `observe` of steps up to `step - lag`."""
        schedule = self.schedule
        if self._decided is None and not isinstance(schedule, FixedSchedule):
            while len(self._known) in self._pending and len(self._known) + schedule.lag <= step:
                self._known.append(self._pending.pop(len(self._known)).read())
            self._decided = schedule.decide(self._known, step)
        return (self._decided or self._undecided).steps[step]

    def observe(self, step: int, pair: Mapping[Branch, Tensor]) -> None:
        """Take note of the estimates of an exact step (ignored once the schedule is settled or wants no more)."""
        schedule = self.schedule
        if self._decided is not None or (isinstance(schedule, SwitchedSchedule) and step >= schedule.measured):
            return
        value, event = discrepancy(pair), None
        if value.is_cuda:
            host = torch.empty((), dtype=value.dtype, device="cpu", pin_memory=True)
            value = host.copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending[step] = _Pending(value, event)
