"""Whether a plan covers a pipeline call, found out before any work: no step is computed for it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from ..ir import Branch, CallSignature, InputError, Plan, PlanMismatchError
from ..profiler.generate import Generation
from ..runtime.intercept import GuidedCall, find_denoiser

__all__ = ["check_covered"]


class _Seen(Exception):
    """Ends the generation at its first denoiser call."""


class _Probe:
    """A `StepHandler` that only looks."""

    num_steps = 0
    signature: CallSignature | None = None

    def start(self, num_steps: int, signature: CallSignature) -> bool:
        """See `StepHandler.start`."""
        self.num_steps, self.signature = num_steps, signature
        raise _Seen

    def step(self, call: GuidedCall) -> Mapping[Branch, Tensor]:
        """Never reached."""
        raise AssertionError("start has ended the generation")


def check_covered(generation: Generation, plan: Plan, prompt: str) -> None:
    """Refuse a plan that was made for another model, resolution or number of steps than `generation` runs.

    Raises:
        PlanMismatchError: naming what differs.
        InputError: the pipeline makes no guided calls.
    """
    _, denoiser = find_denoiser(generation.pipe)
    if type(denoiser).__name__ != plan.model.denoiser:
        _refuse(plan, f"was made for a {plan.model.denoiser}, this model has a {type(denoiser).__name__}")
    probe = _Probe()
    with contextlib.suppress(_Seen):
        generation.latents([prompt], probe)
    if probe.signature is None:
        raise InputError(
            f"{type(generation.pipe).__name__} makes no guided denoiser calls at guidance scale "
            f"{generation.guidance_scale:g}; give one above 1"
        )
    mismatch = plan.model.signature.mismatch(probe.signature)
    if mismatch is not None:
        _refuse(plan, f"does not fit this call: {mismatch}")
    if probe.num_steps != plan.num_steps:
        _refuse(plan, f"has {plan.num_steps} steps, this generation {probe.num_steps}")


def _refuse(plan: Plan, why: str) -> NoReturn:
    raise PlanMismatchError(
        f"the plan for {plan.model.name} {why}; profile this model, resolution and step count and plan again"
    )
