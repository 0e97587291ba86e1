"""Improving a schedule by measurement: where predictions are too coarse to tell good schedules from better ones.

A hill climb over schedules of at most the same cost. A move exchanges neighbouring steps of different patterns (so an
exact step comes earlier or later), or gives one cheap step another pattern; it is kept where the mean PSNR over the
judge's prompts rises. What comes out must be measured on other prompts: it was chosen for these.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..ir import InputError, check_reads
from .equal_cost import EqualCostRow, Judge

__all__ = ["refine"]

_REACH = 3
"""Steps that an exchange may span."""


def refine(
    judge: Judge, row: EqualCostRow, *, patterns: Sequence[str], tries: int, seed: int = 0,
    on_progress: Callable[[int, int, float], None] = lambda done, total, best: None,
) -> EqualCostRow:
    """The best schedule found near `row`, measured.

    Args:
        judge: measures; its prompts are what the schedule is fitted to.
        row: where to start; its budget holds.
        patterns: that cheap steps may run.
        tries: schedules to measure.
        seed: of the moves.
        on_progress: called with (schedules measured, tries, best mean PSNR in dB).
    """
    rng = random.Random(seed)
    best, level = row, statistics.fmean(judge.measure(row))
    seen = {row.steps}
    done = idle = 0
    while done < tries and idle < 100 * tries:
        steps = _moved(best.steps, judge.exact, patterns, rng)
        idle += 1
        if steps in seen or not _runs(judge, steps) or judge.work_speedup(steps) < row.budget * (1 - 1e-9):
            continue
        seen.add(steps)
        done += 1
        candidate = replace(best, steps=steps, work_speedup=judge.work_speedup(steps))
        value = statistics.fmean(judge.measure(candidate))
        if value > level:
            best, level = candidate, value
        on_progress(done, tries, level)
    predicted = judge.predicted_db(best.steps)
    return judge.measured(replace(best, name="refined", predicted_db=predicted))


def _moved(steps: tuple[str, ...], exact: str, patterns: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    inner, changed = range(1, len(steps) - 1), list(steps)
    first = rng.choice(inner)
    if rng.random() < 0.7:
        second = min(max(first + rng.choice([d for d in range(-_REACH, _REACH + 1) if d]), 1), len(steps) - 2)
        changed[first], changed[second] = changed[second], changed[first]
    elif changed[first] != exact:
        changed[first] = rng.choice(patterns)
    return tuple(changed)


def _runs(judge: Judge, steps: tuple[str, ...]) -> bool:
    try:
        check_reads([judge.pattern(name) for name in steps])
    except InputError:
        return False
    return math.isfinite(judge.work_speedup(steps))
