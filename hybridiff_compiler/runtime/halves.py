"""Whether both halves of a batch are one state, found out while the host goes on."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Halves"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element."""


class Halves:
    """One comparison at a time: asked for when a step begins, answered when the answer is needed.

    On a GPU the latents of a step are not there yet when the host hands them over; waiting for them would leave the GPU
    without work afterwards. An answer asked for a step later waits for what the GPU has done by then.
    """

    def __init__(self) -> None:
        self._answer: bool | None = None
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def ask(self, latents: Tensor) -> None:
        """Compare the halves of `latents`, `[2 images, ...]`, bit by bit (what is no number equals itself)."""
        first, second = latents.view(_INTEGERS.get(latents.element_size(), latents.dtype)).chunk(2)
        if not latents.is_cuda:
            self._answer = torch.equal(first, second)
            return
        if self._host is None or self._event is None:
            self._host = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            self._event = torch.cuda.Event()
        self._answer = None
        self._host.copy_((first == second).all(), non_blocking=True)
        self._event.record(torch.cuda.current_stream(latents.device))

    def equal(self) -> bool:
        """What the last comparison found."""
        if self._answer is None:
            assert self._host is not None, "ask first"
            assert self._event is not None, "recorded with the answer"
            self._event.synchronize()
            self._answer = bool(self._host)
        return self._answer
