"""Lower bounds and supported points against brute force over all schedules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.planner import StepTable, prune_dominated, solve_frontier
from hybridiff_compiler.planner import schedule as schedule_module
from hybridiff_compiler.planner.bound import Pricing
from hybridiff_compiler.planner.schedule import one_exact

from .test_schedule import brute_force, literal_error, problems

Problem = tuple[tuple[StepTable, ...], int]


def lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Vertices of the lower convex hull of Pareto points, by increasing latency."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def hull_at(hull: list[tuple[float, float]], latency: float) -> float:
    return float(np.interp(latency, *zip(*hull)))


@settings(max_examples=300, deadline=None)
@given(problems(), st.integers(1, 2), st.integers(1, 2))
def test_supported_points_are_the_hull_of_brute_force(problem: Problem, head: int, tail: int) -> None:
    tables, num_steps = problem
    pricing = Pricing(one_exact(tables), num_steps, exact_head=head, exact_tail=tail)
    assert not pricing.relaxed
    points = {(p.latency_s, p.error) for p in pricing.hull(100)}
    frontier = brute_force(tables, num_steps, head, tail)
    vertices = lower_hull(frontier)
    assert set(vertices) <= points <= set(frontier)


@settings(max_examples=250, deadline=None)
@given(problems(), st.floats(0, 60), st.booleans())
def test_bounds_hold_and_are_those_of_the_hull(problem: Problem, budget: float, relaxed: bool) -> None:
    tables, num_steps = problem
    pricing = Pricing(one_exact(tables), num_steps, cells=0 if relaxed else 10**9)
    frontier = brute_force(tables, num_steps)
    hull = lower_hull(frontier)
    latency = min(x for x, error in frontier if error <= budget)
    bound = pricing.least_latency(budget).value
    assert bound <= latency + 1e-6
    if not pricing.relaxed:
        upright = [(error, x) for x, error in reversed(hull)]
        assert bound == pytest.approx(hull_at(upright, budget), abs=1e-6)
    limit = budget / 2 + hull[0][0]
    bound = pricing.least_error(limit).value
    assert bound <= min(error for x, error in frontier if x <= limit) + 1e-6
    if not pricing.relaxed:
        assert bound == pytest.approx(hull_at(hull, limit), abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(problems(), st.floats(0.001, 100))
def test_one_price_is_the_least_over_all_schedules(problem: Problem, price: float) -> None:
    tables, num_steps = problem
    pricing = Pricing(one_exact(tables), num_steps)
    phi, choices = pricing.solve([price, 2 * price])
    for scale, value, row in zip((1, 2), phi, choices):
        assert value == pytest.approx(min(x + scale * price * e for x, e in brute_force(tables, num_steps)))
        used = one_exact(tables)
        steps = tuple(used[index] for index in row)
        total = sum(table.latency_s for table in steps) + scale * price * literal_error(steps)
        assert total == pytest.approx(value)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_problems_too_large_for_labels_get_supported_points(problem: Problem) -> None:
    tables, num_steps = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "POINTER_BYTES", 0)
        found = solve_frontier(tables, num_steps)
    assert found.supported_only
    frontier = brute_force(tables, num_steps)
    assert set(zip(found.latency_s.tolist(), found.error.tolist())) <= set(frontier)
    for latency, error in frontier:
        if error >= found.error[-1]:
            best = found.latency_s[found.error <= error].min()
            assert best <= latency + found.gap_s + 1e-9 or latency < found.latency_s[0]


def test_hundreds_of_steps_are_solved_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridiff_compiler.planner import Problem as Prepared

    from .profiles import make_profile

    monkeypatch.setattr(schedule_module, "CELL_BUDGET", 10_000_000)
    prepared = Prepared(make_profile(num_steps=200, max_age=3), 2)
    found = solve_frontier(prune_dominated(prepared.tables), 200)
    assert found.supported_only
    assert len(found) > 50
    assert found.gap_s < 0.05 * found.latency_s[-1]
