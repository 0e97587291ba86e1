"""How a command calls the pipeline."""

from __future__ import annotations

from typing import Any

from ..ir import UsageError
from .models import LoadedModel

__all__ = ["call_options", "check_device"]

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
