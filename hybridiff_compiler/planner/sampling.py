"""Random schedules: what predictions are fitted to and checked on besides the schedules that the solver likes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..ir import NEVER, AgeModel, Pattern, Profile
from .problem import Problem
from .proposals import LEVELS_DB, proposals

__all__ = ["random_schedules", "trial_schedules"]

_TRIES = 100
"""Schedules drawn per one that is wanted."""


def trial_schedules(
    profile: Profile, *, levels: Sequence[float] = LEVELS_DB, random: int = 10, seed: int = 0
) -> list[tuple[tuple[str, ...], str]]:
    """Schedules to measure whole, each with its kind, sorted by predicted error within a kind.

    `solved` ones are `proposals`. The planner picks what it predicts best, so they alone would teach its optimism but
    nothing about schedules that users write by hand; `random` ones are drawn, nearest to levels spread evenly over the
    same range of errors, and keep apart what the sum of errors does not know to disturb each other (`mixed`).
    """
    solved = sorted(proposals(profile, levels), key=lambda item: -item[1])
    drawn = random_schedules(Problem(profile, 2), _TRIES, seed=seed, mixed=False) if random else []
    chosen: dict[tuple[str, ...], float] = {}
    for level in np.linspace(min(levels), max(levels), random) if drawn else ():
        left = [item for item in drawn if item[0] not in chosen]
        if left:
            steps, error = min(left, key=lambda item: abs(-20 * math.log10(item[1]) - level))
            chosen[steps] = error
    return [(steps, "solved") for steps, _ in solved] + [
        (steps, "random") for steps, _ in sorted(chosen.items(), key=lambda item: -item[1])
    ]


def random_schedules(
    problem: Problem,
    count: int,
    *,
    seed: int = 0,
    mixed: bool = True,
    wanted: Callable[[float], bool] = lambda error: True,
) -> list[tuple[tuple[str, ...], float]]:
    """Distinct random schedules that begin and end with an exact step, each with the sum of its step errors.

    A schedule draws one to four cheap patterns, the first step that may be cheap (in the first half), and how many of
    the steps from there on are cheap (20 to 90 %); every step then draws for itself. A pattern whose inputs would be
    older than was measured gives way to an exact step.

    Args:
        problem: the candidates.
        count: how many; fewer come when so many are not found.
        seed: of the draws.
        mixed: whether patterns whose stages read the other branch (the paper's) may occur beside others that read
            stale activations, which take over what they left behind: half of the other branch.
        wanted: which summed errors are of interest.
    """
    rng = np.random.default_rng(seed)
    cheap = [table.pattern.name for table in problem.tables if not table.pattern.is_exact]
    found: dict[tuple[str, ...], float] = {}
    for _ in range(_TRIES * count if cheap else 0):
        if len(found) == count:
            break
        steps = _draw(problem, cheap, rng, mixed)
        error = problem.error(steps)
        if error and wanted(error):
            found.setdefault(steps, error)
    return list(found.items())


def _draw(problem: Problem, cheap: list[str], rng: np.random.Generator, mixed: bool) -> tuple[str, ...]:
    size = problem.profile.num_steps
    tables = {table.pattern.name: table for table in problem.tables}
    model = AgeModel.of(table.pattern for table in tables.values())
    chosen = rng.choice(cheap, size=min(len(cheap), int(rng.integers(1, 5))), replace=False).tolist()
    if not mixed and any(_reads_stale(tables[name].pattern, across=True) for name in chosen):
        chosen = [
            name for name in chosen
            if _reads_stale(tables[name].pattern, across=True) or not _reads_stale(tables[name].pattern, across=False)
        ]
    start, share = int(rng.integers(1, max(2, size // 2 + 1))), rng.uniform(0.2, 0.9)
    steps, ages = [], model.start
    for step in range(size):
        table = tables[problem.exact.name]
        if start <= step < size - 1 and rng.random() < share:
            drawn = tables[str(rng.choice(chosen))]
            activations, memory = model.activation_age(ages, drawn.pattern), model.memory_age(ages, drawn.pattern)
            known = drawn.reaches(memory, model.gap(ages, drawn.pattern))
            if known and activations <= (drawn.activation_limit or NEVER) and memory <= (drawn.memory_limit or NEVER):
                table = drawn
        steps.append(table.pattern.name)
        ages = model.advance(ages, table.pattern)
    return tuple(steps)


def _reads_stale(pattern: Pattern, *, across: bool) -> bool:
    """Whether a unit reads stale values; with `across`, of the other branch."""
    return any(
        read.stale and (read.branch != unit.branch or not across) for unit in pattern.units for read in unit.reads
    )
