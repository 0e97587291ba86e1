"""Schedulers that make the host wait for the device: noticing them, and waiting in their stead.

Some (DDIM) index a table with a timestep that is on the GPU. torch waits for the device then without letting other
Python threads run, so that nobody could break off a transfer whose sender has died: the wait would never end. So before
such a scheduler is called, the host waits where other threads run.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["WaitingMethod", "waits_noticed"]

_OBSERVED_CALLS = 2
"""The first call may look things up that later ones know; the second one is like all that follow."""
_WARNING = "called a synchronizing CUDA operation"


class WaitingMethod:
    """Puts a wait before calls of one method, if these would wait for the device anyway.

    Nothing is put before calls that only queue work, except for the first two, which find out.
    """

    def __init__(
        self, settle: Callable[[], None], noticed: Callable[[], Any] | None = None
    ) -> None:
        """
        Args:
            settle: waits until the device has done what was queued.
            noticed: a context that yields a function which tells whether somebody waited; default: `waits_noticed`.
        """
        self._settle, self._noticed = settle, noticed or waits_noticed
        self._calls = 0
        self.waits = True
        """Whether the method is known (or not yet known not) to wait."""

    def wrap(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """`method` with the wait before it."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.waits:
                self._settle()
            if self._calls >= _OBSERVED_CALLS:
                return method(*args, **kwargs)
            self._calls += 1
            with self._noticed() as waited:
                result = method(*args, **kwargs)
            if self._calls == _OBSERVED_CALLS:
                self.waits = waited()
            return result

        return call


@contextmanager
def waits_noticed() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether torch waited for a CUDA device inside the context.

    Other warnings pass through.
    """
    before = torch.cuda.get_sync_debug_mode()
    found = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: found
        finally:
            torch.cuda.set_sync_debug_mode(before)
            found = any(_WARNING in str(warning.message) for warning in caught)
    for warning in caught:
        if not any(own in str(warning.message) for own in (_WARNING, "Synchronization debug mode")):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
