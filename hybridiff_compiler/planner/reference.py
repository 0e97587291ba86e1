"""Honest rows beside a plan: what simpler means give at the same ideal cost."""

from __future__ import annotations

from ..ir import Plan, Profile, UsageError
from .problem import Problem
from .solve import plan_for_steps

__all__ = ["alternating_plan", "alternating_steps", "fewer_steps"]


def alternating_plan(profile: Profile, plan: Plan, cheap: str = "reuse") -> Plan:
    """Exact steps and `cheap` ones spread evenly, as many as bring the ideal cost nearest to that of `plan`.

    Raises:
        UsageError: the profile has no pattern `cheap`, or the plan no prediction.
    """
    problem = Problem(profile, plan.world_size, ranks=plan.ranks)
    if cheap not in problem.by_name:
        raise UsageError(f"got pattern {cheap!r}, which the profile does not know; choose from {list(problem.by_name)}")
    exact = _exact_of(problem, plan)
    wanted = profile.num_steps * problem.costs[problem.single.name].ideal_s / _ideal_speedup(plan)
    candidates = [
        alternating_steps(profile.num_steps, count, exact, cheap) for count in range(max(0, profile.num_steps - 2) + 1)
    ]
    steps = min(candidates, key=lambda s: (abs(problem.ideal_s(s) - wanted), s.count(cheap)))
    return plan_for_steps(problem, steps, plan.ranks, f"ideal cost of {plan.predictions.target}")


def alternating_steps(num_steps: int, count: int, exact: str, cheap: str) -> tuple[str, ...]:
    """`count` cheap steps spread evenly between an exact first and last step.

    Raises:
        UsageError: more cheap steps than there is room for.
    """
    room = num_steps - 2
    if not 0 <= count <= max(0, room):
        raise UsageError(f"got {count} cheap steps of {num_steps}; allowed are 0 to {max(0, room)}")
    if num_steps <= 2:
        return (exact,) * num_steps
    inner = [(index + 1) * count // room > index * count // room for index in range(room)]
    return (exact, *(cheap if is_cheap else exact for is_cheap in inner), exact)


def fewer_steps(profile: Profile, plan: Plan) -> int:
    """How many plain exact steps on the same ranks cost nearest to what `plan` costs, stage times alone.

    Raises:
        UsageError: the plan has no prediction.
    """
    problem = Problem(profile, plan.world_size, ranks=plan.ranks)
    single, exact = (problem.costs[name].ideal_s for name in (problem.single.name, _exact_of(problem, plan)))
    return max(1, round(profile.num_steps * single / _ideal_speedup(plan) / exact))


def _exact_of(problem: Problem, plan: Plan) -> str:
    """The exact steps of the plan, where the profile knows them."""
    return plan.exact if plan.exact in problem.by_name else problem.exact.name


def _ideal_speedup(plan: Plan) -> float:
    if not plan.predictions.ideal_speedup:
        raise UsageError("the plan holds no ideal speed-up to compare with; make it with `plan`")
    return plan.predictions.ideal_speedup
