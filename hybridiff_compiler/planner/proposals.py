"""Schedules worth measuring whole: on them the profiler fits how summed step errors turn into PSNR."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir import Profile
from .patterns import FAMILIES
from .problem import Problem
from .solve import solve_problem

__all__ = ["LEVELS_DB", "proposals"]

LEVELS_DB = (22.0, 26.0, 30.0, 34.0, 38.0, 42.0, 46.0)
"""Error levels, `-20 log10(summed error)`, near which schedules are proposed."""
_FREE = tuple(family.name for family in FAMILIES if family.work == "nothing")
"""Left out for every other proposal: plans without steps that compute nothing must be predicted too."""


def proposals(profile: Profile, levels: Sequence[float] = LEVELS_DB) -> list[tuple[tuple[str, ...], float]]:
    """Schedules of the kind that targets lead to, with the sums of their step errors.

    They are points of the two-rank frontier nearest to each of `levels`, and of the frontier without steps that compute
    nothing nearest to every second one: the planner picks what it predicts best, so a fit to planned schedules also
    takes out the optimism of that choice. Each schedule comes once; exact ones do not come.

    Raises:
        InputError: the profile has no pattern errors.
    """
    found: dict[tuple[str, ...], float] = {}
    for without, wanted in (((), levels), (_FREE, levels[1::2])):
        problem = Problem(profile, 2, without)
        solved = solve_problem(problem)
        points = [i for i in range(len(solved)) if solved.error[i] > 0]
        for level in wanted if points else ():
            error = 10 ** (-level / 20)
            nearest = min(points, key=lambda i: abs(float(solved.error[i]) / error - 1))
            found.setdefault(solved.steps(nearest), float(solved.error[nearest]))
    return list(found.items())
