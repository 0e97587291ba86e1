"""Dry run of schedules over their ranks: reads of what was never produced, and ranks that wait for each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from .ages import check_reads
from .errors import InputError
from .pattern import Branch, Pattern
from .segment import Segment, lower

__all__ = ["dry_run"]


def dry_run(steps: Sequence[Pattern]) -> int:
    """Run every rank's segments in their order, without computing anything: each waits until its fresh reads are there.

    Stale reads and remembered estimates are followed over the steps (`check_reads`). O(steps + segments^2) for the
    distinct patterns.

    Returns:
        The number of segments that all ranks launch over the schedule.

    Raises:
        InputError: a step reads what no step before it, or none of its own segments, produces; or ranks wait for each
            other for ever.
    """
    check_reads(steps)
    launches = {pattern: _run_step(pattern) for pattern in dict.fromkeys(steps)}
    return sum(launches[pattern] for pattern in steps)


def _run_step(pattern: Pattern) -> int:
    segments = lower(pattern)
    queues: dict[int, deque[Segment]] = {}
    for segment in segments:
        queues.setdefault(segment.rank, deque()).append(segment)
    produced: set[tuple[Branch, int]] = set()
    while waiting := [queue for queue in queues.values() if queue]:
        ready = [queue for queue in waiting if not _missing(queue[0], produced)]
        if not ready:
            stuck = "; ".join(f"{queue[0]} waits for {', '.join(_missing(queue[0], produced))}" for queue in waiting)
            raise InputError(f"pattern {pattern}: ranks wait for each other ({stuck}); mark a read stale ('~')")
        for queue in ready:
            segment = queue.popleft()
            produced.update((branch, stage) for branch in segment.branches for stage in segment.stages)
    return len(segments)


def _missing(segment: Segment, produced: set[tuple[Branch, int]]) -> list[str]:
    return [
        str(read) for reads in segment.reads for read in reads
        if read.fresh and (read.branch, read.stage) not in produced
    ]
