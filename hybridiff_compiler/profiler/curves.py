"""Error curves by pattern, step and age, from the sketches of several batches of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from ..ir import ErrorCurve, PatternErrors
from .grid import LONGEST_TREND
from .record import Option
from .sensitivity import Sketches, image_error

__all__ = ["error_curves", "fill_table"]


def error_curves(
    batches: Sequence[Sketches], options: Sequence[Option], ages: Sequence[int], num_steps: int
) -> tuple[PatternErrors, ...]:
    """The curves of every pattern, with a column for every age from 1 to the largest measured.

    Args:
        batches: sketches of the measured (step, option) pairs; every batch has the same ones.
        options: everything that was measured at some step.
        ages: ages that were measured (of patterns whose error depends on one).
        num_steps: steps of a generation.
    """
    patterns: dict[str, dict[tuple[str, int], list[Option]]] = {}
    for option in options:
        patterns.setdefault(option.pattern, {}).setdefault((option.source, option.gap), []).append(option)
    results = []
    for pattern, sources in patterns.items():
        curves = []
        for (source, gap), members in sources.items():
            known = {
                (step, option.age): image_error([batch.steps[step][option] for batch in batches], batches[0].pixels)
                for step in range(num_steps) for option in members if option in batches[0].steps[step]
            }
            if not known:
                continue  # a generation of so few steps has no such gap
            oldest = min(gap, LONGEST_TREND) if gap else 1 if source == "none" else max(ages)
            table = fill_table(known, num_steps, oldest)
            rows = tuple(tuple(float(f"{value:.6g}") for value in row) for row in table)
            curves.append(ErrorCurve(source=members[0].source, gap=gap or None, rmse=rows))
        if curves:
            results.append(PatternErrors(pattern=pattern, curves=tuple(curves)))
    return tuple(results)


def fill_table(known: Mapping[tuple[int, int], float], num_steps: int, max_age: int) -> NDArray[np.float64]:
    """Errors at every step and age from those at some, `[step, age - 1]`.

    Of logarithms: between steps monotone cubic interpolation for each measured age, then between ages straight lines
    over the logarithm of the age (error grows about as a power of it). Ages older than those measured at a step grow
    in proportion. Steps too early for any age repeat the first measured row; no schedule can use them.

    Args:
        known: positive errors by (step, age); age 1 among them.
        num_steps, max_age: size of the table.
    """
    columns: dict[int, NDArray[np.float64]] = {}
    for age in sorted({age for _, age in known}):
        steps = sorted(step for step, other in known if other == age)
        logs = np.log([known[step, age] for step in steps])
        inside = np.arange(steps[0], num_steps)
        column = np.full(num_steps, np.nan)
        column[inside] = PchipInterpolator(steps, logs)(np.minimum(inside, steps[-1])) if len(steps) > 1 else logs[0]
        columns[age] = column
    table = np.empty((num_steps, max_age))
    every = np.arange(1, max_age + 1)
    first = min(step for step, _ in known)
    for step in range(first, num_steps):
        ages = [age for age, column in columns.items() if np.isfinite(column[step])]
        row = np.exp(np.interp(np.log(every), np.log(ages), [columns[age][step] for age in ages]))
        table[step] = row * np.maximum(1.0, every / ages[-1])
    table[:first] = table[first]
    return table
