"""What a pipeline's scheduler tells of its generations: when one begins, how many steps it has, and their timesteps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .instance_hooks import InstanceHook
from .waiting import WaitingMethod

__all__ = ["SchedulerWatch", "tell_first_step"]

_ROUNDING = 1 / 128
"""Relative difference that casting a timestep to bfloat16 may make, twice."""


class SchedulerWatch:
    """Hooks of the pipeline's present scheduler, which may be replaced at any time."""

    def __init__(self, pipe: Any, settle: Callable[[], None] | None) -> None:
        """
        Args:
            pipe: the pipeline.
            settle: called before the scheduler's `step` is, if that would wait for the device (see `waiting`).
        """
        self.fresh = True
        """Whether `set_timesteps` was called since this was last set to False."""
        self._pipe, self._settle = pipe, settle
        self._scheduler: Any = None
        self._hooks: list[InstanceHook] = []
        self._timesteps: Tensor | None = None

    def follow(self) -> None:
        """Hook `set_timesteps` (and `step`) of the scheduler that the pipeline has now."""
        scheduler = self._pipe.scheduler
        if scheduler is self._scheduler:
            return
        self.release()
        original = scheduler.set_timesteps

        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self.fresh = True
            return original(*args, **kwargs)

        self._hooks = [InstanceHook.put(scheduler, "set_timesteps", set_timesteps)]
        if self._settle is not None and hasattr(scheduler, "step"):
            step = WaitingMethod(self._settle).wrap(scheduler.step)
            self._hooks.append(InstanceHook.put(scheduler, "step", step))
        self._scheduler, self.fresh = scheduler, True

    def release(self) -> None:
        """Undo all hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._scheduler = [], None

    def begin(self, timestep: Tensor) -> int:
        """Denoiser calls in the generation that begins with this timestep (one read of the device per generation)."""
        timesteps = [float(t) for t in self._scheduler.timesteps.tolist()]
        start = getattr(self._scheduler, "begin_index", None)  # pipelines that begin later mostly tell it
        if start is None:
            first = float(timestep.reshape(-1)[0])
            # Some pipelines hand the denoiser timesteps between 0 and 1.
            trained = getattr(getattr(self._scheduler, "config", None), "num_train_timesteps", None) or 1
            away = [min(_distance(t, first), _distance(t / trained, first)) for t in timesteps]
            nearest = min(range(len(away)), key=away.__getitem__)
            if away[nearest] < _ROUNDING:
                start = nearest
                tell_first_step(self._scheduler, timesteps, start)
            else:  # made into something else (Lumina 2 counts upwards), of which nothing can be told
                start = 0
        self._timesteps = self._scheduler.timesteps[start:]
        return len(timesteps) - start

    def timesteps(self, timestep: Tensor, step: int) -> Tensor | None:
        """The timesteps of the generation's steps, `[steps]`, if the denoiser gets these themselves, as `timestep` at
        `step`; None if it gets something else."""
        known = self._timesteps
        return known if known is not None and _is_entry(timestep, known, step) else None


def tell_first_step(scheduler: Any, timesteps: Sequence[float], start: int) -> None:
    """Spare a scheduler looking for its first timestep on the device, for which the host would wait.

    It would do so after the first step has been queued. A scheduler that knows already, that has no such method, or
    whose timesteps are not distinct (which makes it choose among them) is left alone.
    """
    unknown = getattr(scheduler, "step_index", 0) is None and getattr(scheduler, "begin_index", 0) is None
    if unknown and hasattr(scheduler, "set_begin_index") and len(set(timesteps)) == len(timesteps):
        scheduler.set_begin_index(start)


def _is_entry(timestep: Tensor, timesteps: Tensor, index: int) -> bool:
    """Whether `timestep` is memory of `timesteps` itself, at `index`, for every image of a batch."""
    return (
        timestep.dtype == timesteps.dtype and timestep.device == timesteps.device and index < len(timesteps)
        and timestep.data_ptr() == timesteps.data_ptr() + index * timesteps.stride(0) * timesteps.element_size()
        and all(size == 1 or stride == 0 for size, stride in zip(timestep.shape, timestep.stride()))
    )


def _distance(one: float, other: float) -> float:
    """Relative difference of two timesteps."""
    return abs(one - other) / max(abs(one), abs(other), 1e-6)
