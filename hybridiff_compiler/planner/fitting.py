"""Plans within the memory of every rank.

What a rank needs grows with the tables that it must be able to run (`memory.plan_memory`), so a schedule fits or not
as a whole. Algorithm: tables that do not fit even beside the exact ones alone are left out. Where the schedule that
is best without limits uses a set of tables that does not fit together, every schedule that fits lacks one of them; so
each is left out in turn and the search goes on there. The best of what fits is the optimum among the solver's
schedules; at most `MAX_SOLVES` frontiers are solved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..ir import WHOLE, Pattern, Plan, RankSpec, TargetError
from .memory import predicted_peaks
from .problem import Problem
from .schedule import Frontier

__all__ = ["MAX_SOLVES", "Solved", "best_that_fits", "peaks_of", "within_limits"]

MAX_SOLVES = 24
_MIB = 2**20


@dataclass(frozen=True, eq=False)
class Solved:
    """A frontier and the point of it that answers the target."""

    problem: Problem
    frontier: Frontier
    point: int
    value: float
    """What is minimised: latency or error."""


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
    if not _fits(peaks, plan.ranks):
        raise TargetError(
            f"the plan needs {_listed(peaks)}, {_limits(plan.ranks)}; nearest is that much memory, or more ranks with "
            "weights='stages'"
        )
    return plan


def best_that_fits(
    problem: Callable[[frozenset[str]], Problem], solve: Callable[[Problem], Solved], ranks: Sequence[RankSpec],
) -> Solved:
    """The best answer whose tables fit every rank.

    Args:
        problem: the candidates without the tables of these names.
        solve: the best answer of a problem.
        ranks: with their limits.

    Raises:
        TargetError: nothing fits, or what fits does not reach the target; the message names the nearest.
    """
    everything = problem(frozenset())
    if all(rank.memory_bytes is None for rank in ranks):
        return solve(everything)
    exact = everything.exact
    needed = peaks_of(everything, ranks, [exact])
    if not _fits(needed, ranks):
        raise TargetError(f"no plan fits: exact steps alone need {_listed(needed)}, {_limits(ranks)}; nearest is that "
                          "much memory, or more ranks with weights='stages'")
    alone = frozenset(
        p.name for p in everything.patterns
        if not p.is_exact and not _fits(peaks_of(everything, ranks, [exact, p]), ranks)
    )
    best: Solved | None = None
    refused: TargetError | None = None
    too_large: tuple[int, ...] | None = None
    waiting, seen = [alone], {alone}
    while waiting and len(seen) <= MAX_SOLVES:
        omitted = waiting.pop(0)
        try:
            found = solve(problem(omitted))
        except TargetError as error:
            refused = refused or error
            continue
        if best is not None and found.value >= best.value:
            continue
        used = [found.problem.by_name[name] for name in dict.fromkeys(found.frontier.steps(found.point))]
        peaks = peaks_of(everything, ranks, list(dict.fromkeys((*used, exact))))
        if _fits(peaks, ranks):
            best = found
            continue
        too_large = too_large or peaks
        for pattern in used:
            fewer = omitted | {pattern.name}
            if not pattern.is_exact and fewer not in seen:
                seen.add(fewer)
                waiting.append(fewer)
    if best is None:
        limits = f"within the memory of the ranks ({_limits(ranks)})"
        nearest = f"; a plan for the target needs {_listed(too_large)}" if too_large is not None else ""
        raise TargetError(f"{limits}: {refused}{nearest}" if refused else f"nothing was found {limits}{nearest}")
    return best


def _fits(peaks: Sequence[int], ranks: Sequence[RankSpec]) -> bool:
    return all(rank.memory_bytes is None or peak <= rank.memory_bytes for peak, rank in zip(peaks, ranks))


def _listed(peaks: Sequence[int]) -> str:
    return ", ".join(f"{math.ceil(peak / _MIB)} MiB on rank {rank}" for rank, peak in enumerate(peaks))


def _limits(ranks: Sequence[RankSpec]) -> str:
    known = [f"{r.memory_bytes / _MIB:.1f} MiB on rank {k}" for k, r in enumerate(ranks) if r.memory_bytes is not None]
    return f"allowed are {', '.join(known)}"
