"""Generations that begin with steps already known, so that only what differs is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ir import BRANCHES, Branch, CallSignature, Pattern
from ..runtime.intercept import GuidedCall, StepHandler

__all__ = ["Resumed", "known_steps"]

_LOOKED_BACK = 2
"""Exact steps before the first cheap one that are computed again: it may read what the last one left behind, and draw
a line through the estimates of both."""


def known_steps(patterns: Mapping[str, Pattern], steps: Sequence[str]) -> int:
    """How many steps of a schedule need not be computed where an exact generation of the same prompts is known."""
    cheap = (step for step, name in enumerate(steps) if not patterns[name].is_exact)
    return max(0, next(cheap, len(steps)) - _LOOKED_BACK)


class Resumed:
    """A `StepHandler` that answers the first steps with known estimates and leaves the others to another one."""

    def __init__(self, handler: StepHandler, known: Tensor) -> None:
        """
        Args:
            handler: whose state must not depend on the steps that it does not see.
            known: [steps, 2, P, ...], estimates of the first steps of P images, branches in the order of `BRANCHES`.
        """
        self._handler, self._known = handler, known

    def start(self, num_steps: int, signature: CallSignature) -> bool:
        """See `StepHandler.start`."""
        return self._handler.start(num_steps, signature)

    @torch.no_grad()
    def step(self, call: GuidedCall) -> Mapping[Branch, Tensor] | None:
        """See `StepHandler.step`."""
        if call.step >= len(self._known):
            return self._handler.step(call)
        device = next(iter(call.inputs["cond"].values())).device
        return dict(zip(BRANCHES, self._known[call.step].to(device)))
