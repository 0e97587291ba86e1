"""Random schedules: what predictions are fitted to and checked on besides the schedules that the solver likes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ..ir import NEVER, AgeModel, Pattern, Profile
from .patterns import family_of
from .problem import Problem
from .proposals import LEVELS_DB, proposals

__all__ = ["random_schedules", "trial_schedules"]

_NEAR_DB = 1.0
"""Schedules so close to a level are as good as each other."""
_TRIES = 100
"""Schedules drawn per one that is wanted."""


def trial_schedules(
    profile: Profile, *, levels: Sequence[float] = LEVELS_DB, random: int = 10, seed: int = 0
) -> list[tuple[tuple[str, ...], str]]:
    """Schedules to measure whole, each with its kind, sorted by predicted error within a kind.

    `solved` ones are `proposals`. The planner picks what it predicts best, so they alone would teach its optimism but
    nothing about schedules that users write by hand; `random` ones are drawn, near levels spread evenly over the same
    range of errors, those first that have what others have little of, and keep apart what the sum of errors does not
    know to disturb each other (`mixed`).
    """
    solved = sorted(proposals(profile, levels), key=lambda item: -item[1])
    problem = Problem(profile, 2)
    drawn = random_schedules(problem, 2 * _TRIES, seed=seed, mixed=False) if random else []
    chosen: dict[tuple[str, ...], float] = {}
    seen: Counter[str] = Counter()
    for steps, _ in solved:
        seen.update(_shares(problem, steps))
    for level in np.linspace(min(levels), max(levels), random) if drawn else ():
        left = {steps: error for steps, error in drawn if steps not in chosen}
        if left:
            away = {steps: abs(-20 * math.log10(error) - level) for steps, error in left.items()}
            within = max(_NEAR_DB, min(away.values()))
            shares = {steps: _shares(problem, steps) for steps, distance in away.items() if distance <= within}
            steps = max(shares, key=lambda each: sum(part / (1 + seen[f]) for f, part in shares[each].items()))
            chosen[steps] = left[steps]
            seen.update(shares[steps])
    return [(steps, "solved") for steps, _ in solved] + [
        (steps, "random") for steps, _ in sorted(chosen.items(), key=lambda item: -item[1])
    ]


def _shares(problem: Problem, steps: Sequence[str]) -> Counter[str]:
    """Of the cheap steps of a schedule, the share of each family."""
    exact = {table.pattern.name for table in problem.tables if table.pattern.is_exact}
    cheap = [family_of(name) for name in steps if name not in exact]
    return Counter({family: count / len(cheap) for family, count in Counter(cheap).items()})


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
