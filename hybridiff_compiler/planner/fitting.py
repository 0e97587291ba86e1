"""Plans within the memory of every rank.

What a rank needs grows with the tables that it must be able to run (`memory.plan_memory`), so a schedule fits or not
as a whole. Algorithm: tables that do not fit even beside the exact ones alone are left out. Where the schedule that
is best without limits uses a set of tables that does not fit together, every schedule that fits lacks one of them; so
each is left out in turn and the search goes on there. The best of what fits is the optimum among the solver's
schedules; at most `MAX_SOLVES` sets of candidates are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..ir import WHOLE, Pattern, Plan, RankSpec, TargetError
from .memory import predicted_peaks
from .problem import Problem
from .schedule import Frontier

__all__ = [
    "MAX_SOLVES", "Choice", "Solved", "best_that_fits", "fits", "peaks_of", "peaks_of_steps", "refused",
    "within_limits",
]

MAX_SOLVES = 24
_MIB = 2**20


@dataclass(frozen=True, eq=False)
class Solved:
    """A frontier and the point of it that answers a question."""

    problem: Problem
    frontier: Frontier
    point: int

    @property
    def latency_s(self) -> float:
        """Of the point."""
        return float(self.frontier.latency_s[self.point])

    @property
    def error(self) -> float:
        """Of the point."""
        return float(self.frontier.error[self.point])


@dataclass(frozen=True)
class Choice:
    """A question to a frontier."""

    point: Callable[[Problem, Frontier], int | None]
    """The point that answers it best; None when none does."""
    value: Callable[[Solved], float]
    """What is minimised."""


def peaks_of(problem: Problem, ranks: Sequence[RankSpec], patterns: Sequence[Pattern]) -> tuple[int, ...]:
    """Predicted bytes of every rank that can run `patterns` (for one image)."""
    profile = problem.profile
    names = dict.fromkeys(pattern.partition for pattern in patterns if pattern.partition != WHOLE)
    return predicted_peaks(
        profile.graph, profile.model.signature, patterns, [profile.partition(name) for name in names],
        ranks=len(ranks), parameter_bytes=profile.model.parameter_bytes, recorded=ranks[0].device == "cuda",
        stage_weights=problem.weights == "stages",
    )


def within_limits(plan: Plan) -> Plan:
    """`plan` if it fits.

    Raises:
        TargetError: it does not; the message says what it needs.
    """
    peaks = plan.predictions.peak_bytes or ()
    if not fits(peaks, plan.ranks):
        raise TargetError(
            f"the plan needs {_listed(peaks)}, {_limits(plan.ranks)}; nearest is that much memory, or more ranks with "
            "weights='stages'"
        )
    return plan


def best_that_fits(
    solve: Callable[[frozenset[str]], tuple[Problem, Frontier]], choose: Choice, ranks: Sequence[RankSpec],
    placed: Problem,
) -> Solved | None:
    """The best answer whose tables fit every rank; None when no schedule that fits answers.

    Args:
        solve: the candidates without the tables of these names, and their frontier.
        choose: the best point of a frontier, and what is minimised.
        ranks: with their limits.
        placed: its tables are on the ranks that a plan will run them on.

    Raises:
        TargetError: not even exact steps fit; the message says what they need.
    """
    if all(rank.memory_bytes is None for rank in ranks):
        problem, frontier = solve(frozenset())
        point = choose.point(problem, frontier)
        return None if point is None else Solved(problem, frontier, point)
    exact = [p for p in placed.patterns if p.is_exact]
    roomy = [p for p in exact if fits(peaks_of(placed, ranks, [p]), ranks)]
    if not roomy:
        raise TargetError(
            f"no plan fits: exact steps alone need {_listed(peaks_of(placed, ranks, [placed.exact]))}, "
            f"{_limits(ranks)}; nearest is that much memory, or more ranks with weights='stages'"
        )
    alone = frozenset(
        p.name for p in placed.patterns
        if p not in roomy and not any(fits(peaks_of(placed, ranks, [e, p]), ranks) for e in roomy)
    )
    best: Solved | None = None
    waiting, seen = [alone], {alone}
    while waiting and len(seen) <= MAX_SOLVES:
        omitted = waiting.pop(0)
        problem, frontier = solve(omitted)
        point = choose.point(problem, frontier)
        if point is None:
            continue
        found = Solved(problem, frontier, point)
        if best is not None and choose.value(found) >= choose.value(best):
            continue
        steps = frontier.steps(point)
        if fits(peaks_of_steps(placed, ranks, steps), ranks):
            best = found
            continue
        for name in dict.fromkeys(steps):
            fewer = omitted | {name}
            if fewer not in seen and not fewer.issuperset(p.name for p in exact):
                seen.add(fewer)
                waiting.append(fewer)
    return best


def peaks_of_steps(placed: Problem, ranks: Sequence[RankSpec], steps: Sequence[str]) -> tuple[int, ...]:
    """Predicted bytes of every rank that can run a schedule."""
    return peaks_of(placed, ranks, [placed.by_name[name] for name in dict.fromkeys((*steps, placed.exact_of(steps)))])


def refused(message: str, ranks: Sequence[RankSpec], needed: Sequence[int] | None) -> TargetError:
    """`message` with the limits that it holds for, and what a plan for the target `needed` without them."""
    if all(rank.memory_bytes is None for rank in ranks):
        return TargetError(message)
    nearest = "" if needed is None else f"; a plan for the target needs {_listed(needed)}"
    return TargetError(f"within the memory of the ranks ({_limits(ranks)}): {message}{nearest}")


def fits(peaks: Sequence[int], ranks: Sequence[RankSpec]) -> bool:
    """Whether no rank needs more than it has."""
    return all(rank.memory_bytes is None or peak <= rank.memory_bytes for peak, rank in zip(peaks, ranks))


def _listed(peaks: Sequence[int]) -> str:
    return ", ".join(f"{math.ceil(peak / _MIB)} MiB on rank {rank}" for rank, peak in enumerate(peaks))


def _limits(ranks: Sequence[RankSpec]) -> str:
    known = [f"{r.memory_bytes / _MIB:.1f} MiB on rank {k}" for k, r in enumerate(ranks) if r.memory_bytes is not None]
    return f"allowed are {', '.join(known)}"
