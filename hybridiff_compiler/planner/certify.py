"""How far from optimal a chosen schedule can be: the certificate of a plan."""

from __future__ import annotations

from typing import Literal

from ..ir import Certificate
from .bound import Pricing
from .problem import Problem
from .schedule import Frontier, one_exact
from .tables import prune_dominated
from .target import Target

__all__ = ["certify", "largest_error"]

_SLACK = 1e-9


def certify(problem: Problem, target: Target, solved: Frontier, point: int) -> Certificate:
    """A proof for the point of a frontier that answers `target`.

    The bound holds over every schedule of every candidate pattern, also where the frontier was solved over fewer
    candidates or merged ages. Where that makes too many ages, it is over the candidates that no other beats
    (`prune_dominated`), and where even those are too many, ages are relaxed. Where the solver itself was exact over
    all candidates, its own guarantee (`Frontier.gap_s`) is used if it is the sharper one.
    """
    tables = one_exact(problem.tables)
    over: Literal["all", "undominated", "relaxed"] = "all"
    pricing = Pricing(tables, problem.profile.num_steps)
    if pricing.relaxed:
        fewer = Pricing(one_exact(prune_dominated(problem.tables)), problem.profile.num_steps)
        if fewer.relaxed:
            over = "relaxed"
        else:
            pricing, over = fewer, "undominated"
    latency, error = float(solved.latency_s[point]), float(solved.error[point])
    exact_over_all = not solved.simplified and not solved.supported_only and set(solved.names) == {
        table.pattern.name for table in tables
    }
    needed, budget = target.needed_db(problem), target.budget_s(problem)
    if needed is not None:
        bound = pricing.least_latency(largest_error(problem, needed, target.quantile, at_least=error))
        value, lower = latency, max(bound.value, latency - solved.gap_s) if exact_over_all else bound.value
    else:
        assert budget is not None, "a target has a quality or a latency"
        bound = pricing.least_error(budget * (1 + _SLACK))
        value, lower = error, error if exact_over_all and solved.gap_s <= _SLACK * latency else bound.value
    return Certificate(
        objective="error" if needed is None else "latency_s", value=value, lower_bound=min(value, lower),
        states=max(1, solved.states), labels=max(1, solved.labels), simplified=solved.simplified,
        over=over,
    )


def largest_error(problem: Problem, judged_db: float, quantile: float | None, at_least: float = 0.0) -> float:
    """The largest summed error that is still judged as good as `judged_db`, by bisection; `at_least` is known to be."""
    low, high = at_least, max(at_least, 1e-12)
    while problem.judged_db(high, quantile) >= judged_db and high < 1e6:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.judged_db(middle, quantile) >= judged_db else (low, middle)
    return high
