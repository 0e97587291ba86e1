"""How a command calls the pipeline."""

from __future__ import annotations

import math
from typing import Any

from ..ir import UsageError
from .models import LoadedModel

__all__ = ["call_options", "check_backend", "check_device", "check_finite"]

DEVICES = ("cpu", "cuda")


def call_options(loaded: LoadedModel, height: int | None, width: int | None) -> dict[str, Any]:
    """Keyword arguments of the pipeline call besides prompt, steps, guidance and seed."""
    size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    return {**loaded.options, **size}


def check_device(device: str) -> None:
    """Refuse a device that is neither `cpu` nor `cuda`.

    Raises:
        UsageError: it is something else.
    """
    if device not in DEVICES:
        raise UsageError(f"got device {device!r}; choose from {', '.join(DEVICES)}")


def check_backend(backend: str | None) -> None:
    """Refuse, before anything is measured, a backend that runs no stage graphs (None: the default).

    Raises:
        UsageError: it is something else.
    """
    if backend not in (None, "eager", "inductor"):
        raise UsageError(f"got backend {backend!r}; choose from eager, inductor")


def check_finite(**options: float | None) -> None:
    """Refuse infinities and NaN, which would make images of nothing or comparisons that never fail.

    Raises:
        UsageError: naming the option.
    """
    for name, value in options.items():
        if value is not None and not math.isfinite(value):
            raise UsageError(f"got --{name.replace('_', '-')} {value:g}; give a number")
