"""Numbers of GPUs, and the numbers of stages that suit them."""

from __future__ import annotations

from ..ir import UsageError

__all__ = ["MAX_GPUS", "check_gpus", "stage_counts"]

MAX_GPUS = 64
"""Largest number of ranks that patterns are generated for."""


def check_gpus(gpus: int) -> None:
    """Refuse a number of GPUs out of range.

    Raises:
        UsageError: `gpus` is not in 1..`MAX_GPUS`.
    """
    if not 1 <= gpus <= MAX_GPUS:
        raise UsageError(f"got {gpus} GPUs; patterns are generated for 1 to {MAX_GPUS} ranks")


def stage_counts(gpus: int) -> tuple[int, ...]:
    """How many stages divide the work of `gpus` ranks: all ranks, half of them (the other half has the other branch),
    and on by halves down to 2. Fewer stages are less stale, more stages are faster.

    Raises:
        UsageError: `gpus` is not in 1..`MAX_GPUS`.
    """
    check_gpus(gpus)
    counts = []
    while gpus >= 2:
        counts.append(gpus)
        gpus = -(-gpus // 2) if gpus > 2 else 1
    return tuple(reversed(counts))
