"""The schedule solver against brute force over all schedules, ages followed by the literal `AgeModel`."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.ir import AgeModel, ErrorCurve, Pattern, PatternErrors, UsageError
from hybridiff_compiler.planner import StepTable, prune_dominated, schedule_errors, solve_frontier, step_tables
from hybridiff_compiler.planner.program import to_ticks
from hybridiff_compiler.planner.states import state_space

POOL = (
    Pattern.parse("paper:a", "u0@0(c1~) c1@1(u0~) | mirror", partition="a", stages=2),
    Pattern.parse("cond-pipe:a", "c0@0(c1~) c1@1(c0~) | delta", partition="a", stages=2),
    Pattern.parse("plain:a", "c0@0(c1~) c1@1(c0~) | mirror", partition="a", stages=2),
    Pattern.parse("branch-reuse:a", "u1@0(u0~) c1@1(c0~) | cfg", partition="a", stages=2),
    Pattern.parse("branch-reuse:b", "u1@0(u0~) c1@1(c0~) | cfg", partition="b", stages=2),
    Pattern.parse("unguided", "c0@0 | mirror"),
    Pattern.parse("reuse", "- | last"),
    Pattern.parse("trend", "- | last+1"),
    Pattern.parse("half-trend", "- | last+0.5"),
)
BRANCH = Pattern.parse("branch", "u0@0 c0@1 | cfg")
SINGLE = Pattern.parse("single", "u0@0 c0@0 | cfg")


def sources_of(pattern: Pattern) -> list[str]:
    stale = any(read.stale for unit in pattern.units for read in unit.reads)
    sources = (["activations"] if stale else []) + (["memory"] if pattern.combine in ("delta", "last") else [])
    return sources or ["none"]


@st.composite
def problems(draw: st.DrawFn, max_steps: int = 5) -> tuple[tuple[StepTable, ...], int]:
    """Random tables: whole latencies, whole errors (not monotone in anything), few steps, patterns and ages."""
    num_steps = draw(st.integers(1, max_steps))
    cheap = draw(st.lists(st.sampled_from(POOL), min_size=1, max_size=4, unique=True))
    errors = {}
    for pattern in cheap:
        curves = []
        for source in sources_of(pattern):
            gaps = draw(st.sampled_from([(1,), (2,), (1, 3), (1, 2, 3)])) if pattern.trend else (None,)
            for gap in gaps:
                ages = 1 if source == "none" else draw(st.integers(1, 3))
                row = st.lists(st.integers(0, 20).map(float), min_size=ages, max_size=ages).map(tuple)
                rows = draw(st.lists(row, min_size=num_steps, max_size=num_steps))
                curves.append(ErrorCurve(source=source, gap=gap, rmse=tuple(rows)))
        errors[pattern.name] = PatternErrors(pattern=pattern.name, curves=tuple(curves))
    patterns = (SINGLE, BRANCH, *cheap)
    latencies = {pattern.name: float(draw(st.integers(1, 9))) for pattern in patterns}
    return step_tables(patterns, latencies, errors), num_steps


def literal_error(steps: tuple[StepTable, ...]) -> float:
    """The sum of step errors, straight from the definitions in `ir`."""
    model = AgeModel.of(table.pattern for table in steps)
    ages, total = model.start, 0.0
    for step, table in enumerate(steps):
        pattern = table.pattern
        if not pattern.is_exact:
            activation, memory = model.activation_age(ages, pattern), model.memory_age(ages, pattern)
            for curve, age in ((table.activations, activation), (table.memory, memory)):
                if curve is not None:
                    total += curve[step, age - 1] if age <= curve.shape[1] else math.inf
            total += table.base[step] if table.base is not None else 0.0
            total += literal_trend(table, step, memory, model.gap(ages, pattern)) if pattern.trend else 0.0
        ages = model.advance(ages, pattern)
    return total


def literal_trend(table: StepTable, step: int, age: int, gap: int) -> float:
    assert table.trends is not None
    known = [number for number, measured in enumerate(table.gaps) if measured >= gap]
    return float(table.trends[step, known[0], age - 1]) if known and age <= table.trends.shape[2] else math.inf


def brute_force(
    tables: tuple[StepTable, ...], num_steps: int, head: int = 1, tail: int = 1
) -> list[tuple[float, float]]:
    """Pareto points (latency, error) of all schedules."""
    points = set()
    for steps in itertools.product(tables, repeat=num_steps):
        fixed = (*steps[:head], *steps[max(0, num_steps - tail):])
        if all(table.pattern.is_exact for table in fixed) and math.isfinite(error := literal_error(steps)):
            points.add((sum(table.latency_s for table in steps), error))
    best, frontier = math.inf, []
    for latency, error in sorted(points):
        if error < best:
            best = error
            frontier.append((latency, error))
    return frontier


@settings(max_examples=250, deadline=None)
@given(problems())
def test_the_frontier_is_that_of_brute_force(problem: tuple[tuple[StepTable, ...], int]) -> None:
    check_against_brute_force(problem)


@pytest.mark.slow
@settings(max_examples=2500, deadline=None)
@given(problems())
def test_the_frontier_is_that_of_brute_force_on_thousands(problem: tuple[tuple[StepTable, ...], int]) -> None:
    check_against_brute_force(problem)


def check_against_brute_force(problem: tuple[tuple[StepTable, ...], int]) -> None:
    tables, num_steps = problem
    found = solve_frontier(tables, num_steps)
    assert list(zip(found.latency_s.tolist(), found.error.tolist())) == brute_force(tables, num_steps)
    assert found.gap_s < 1e-9
    assert not found.simplified
    by_name = {table.pattern.name: table for table in tables}
    for index in range(len(found)):
        steps = tuple(by_name[name] for name in found.steps(index))
        assert sum(table.latency_s for table in steps) == found.latency_s[index]
        assert literal_error(steps) == found.error[index]


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 3), st.integers(1, 3))
def test_exact_head_and_tail(problem: tuple[tuple[StepTable, ...], int], head: int, tail: int) -> None:
    tables, num_steps = problem
    found = solve_frontier(tables, num_steps, exact_head=head, exact_tail=tail)
    assert list(zip(found.latency_s.tolist(), found.error.tolist())) == brute_force(tables, num_steps, head, tail)


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(1, 4), st.randoms())
def test_rounding_costs_no_more_than_the_certified_gap(
    problem: tuple[tuple[StepTable, ...], int], ticks: int, random
) -> None:
    tables, num_steps = problem
    tables = tuple(replace(t, latency_s=t.latency_s + random.random()) for t in tables)
    found = solve_frontier(tables, num_steps, ticks=ticks)
    for latency, error in brute_force(tables, num_steps):
        best = found.latency_s[found.error <= error].min()
        assert latency - 1e-9 <= best <= latency + found.gap_s + 1e-9


@settings(max_examples=60, deadline=None)
@given(problems())
def test_simplified_ages_still_give_valid_schedules(problem: tuple[tuple[StepTable, ...], int]) -> None:
    tables, num_steps = problem
    found = solve_frontier(tables, num_steps, max_states=2)
    by_name = {table.pattern.name: table for table in tables}
    optimum = brute_force(tables, num_steps)
    for index in range(len(found)):
        steps = tuple(by_name[name] for name in found.steps(index))
        assert literal_error(steps) == found.error[index]
        assert min(e for latency, e in optimum if latency <= found.latency_s[index]) <= found.error[index]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_automaton_has_the_ages_of_the_age_model(problem: tuple[tuple[StepTable, ...], int]) -> None:
    tables, _ = problem
    space = state_space(tables)
    assert space is not None
    model = AgeModel.of(table.pattern for table in tables)
    rng = np.random.default_rng(0)
    for _ in range(10):
        state, ages = 0, model.advance(model.start, BRANCH)
        for _ in range(12):
            allowed = [p for p in range(len(tables)) if space.target[p, state] >= 0]
            for p, table in enumerate(tables):
                if table.pattern.is_exact:
                    continue
                activation, memory = model.activation_age(ages, table.pattern), model.memory_age(ages, table.pattern)
                usable = (table.activations is None or activation <= table.activations.shape[1]) and (
                    table.memory is None or memory <= table.memory.shape[1]
                ) and (
                    table.trends is None
                    or math.isfinite(literal_trend(table, 0, memory, model.gap(ages, table.pattern)))
                )
                assert (p in allowed) == usable
                if usable and table.activations is not None:
                    assert space.activation_age[p, state] == activation
                if usable and table.memory is not None:
                    assert space.memory_age[p, state] == memory
                if usable and table.trends is not None:
                    gap = model.gap(ages, table.pattern)
                    assert space.gap[p, state] >= gap
                    assert not any(gap <= measured < space.gap[p, state] for measured in table.gaps)
            choice = int(rng.choice(allowed))
            state, ages = int(space.target[choice, state]), model.advance(ages, tables[choice].pattern)


@settings(max_examples=100, deadline=None)
@given(problems(max_steps=4), st.data())
def test_schedule_errors_match_the_definition(problem: tuple[tuple[StepTable, ...], int], data: st.DataObject) -> None:
    tables, num_steps = problem
    index = st.integers(0, len(tables) - 1)
    rows = data.draw(st.lists(st.lists(index, min_size=num_steps, max_size=num_steps), min_size=1, max_size=5))
    choices = np.array(rows, dtype=np.int16)
    expected = [literal_error(tuple(tables[i] for i in row)) for row in rows]
    exact_start = [tables[row[0]].pattern.is_exact for row in rows]
    for got, want, valid in zip(schedule_errors(tables, choices).tolist(), expected, exact_start):
        if valid:
            assert got == want


def table(pattern: Pattern, latency: float, rmse: list[list[float]], source: str = "activations") -> StepTable:
    curve = ErrorCurve(source=source, rmse=tuple(map(tuple, rmse)))  # type: ignore[arg-type]
    errors = {pattern.name: PatternErrors(pattern=pattern.name, curves=(curve,))}
    return step_tables([pattern], {pattern.name: latency}, errors)[0]


def test_pruning_keeps_what_is_better_anywhere() -> None:
    good = table(POOL[3], 1.0, [[9, 9], [1, 9], [1, 2]])
    worse = table(POOL[4], 1.0, [[0, 0], [1, 0], [1, 3]])  # better only where no schedule gets: age 2 at step 1
    slower = table(POOL[4], 2.0, [[9, 9], [1, 9], [1, 2]])
    better_once = table(POOL[4], 1.0, [[9, 9], [1, 9], [2, 1]])
    assert prune_dominated([good, worse]) == (good,)
    assert prune_dominated([worse, good]) == (good,)
    assert prune_dominated([good, slower]) == (good,)
    assert prune_dominated([good, better_once]) == (good, better_once)
    twins = [table(POOL[3], 1.0, [[1.0]]), table(POOL[4], 1.0, [[1.0]])]
    assert [t.pattern.name for t in prune_dominated(twins)] == ["branch-reuse:a"]


def test_pruning_compares_like_with_like() -> None:
    shorter = table(POOL[3], 1.0, [[1.0], [1.0], [1.0]])
    longer = table(POOL[4], 1.0, [[1.0, 9.0]] * 3)
    memory = table(POOL[6], 0.5, [[0.1]] * 3, source="memory")
    assert prune_dominated([shorter, longer]) == (longer,)
    assert prune_dominated([memory, shorter]) == (memory, shorter)
    exact = step_tables([SINGLE, BRANCH], {"single": 2.0, "branch": 1.0}, {})
    assert [t.pattern.name for t in prune_dominated([*exact, memory])] == ["branch", "reuse"]


def test_ticks_fit_exactly_where_they_can() -> None:
    ticks, rest = to_ticks(np.array([1.0, 2.5, 4.0, 1.5]), 100)
    assert ticks.tolist() == [0, 3, 6, 1]
    assert rest == pytest.approx([0, 0, 0, 0])
    ticks, rest = to_ticks(np.array([0.0, math.pi, 10.0]), 50)
    assert 25 <= ticks.max() <= 50
    assert np.abs(rest).max() <= 10.0 / 25 / 2
    assert to_ticks(np.array([2.0, 2.0]), 9)[0].tolist() == [0, 0]


def test_wrong_arguments_are_named() -> None:
    reuse = table(POOL[6], 0.5, [[0.1]] * 3, source="memory")
    with pytest.raises(UsageError, match="no exact pattern"):
        solve_frontier([reuse], 3)
    exact = StepTable(BRANCH, 1.0)
    for arguments in ({"num_steps": 0}, {"num_steps": 3, "exact_head": 0}, {"num_steps": 3, "exact_tail": 0}):
        with pytest.raises(UsageError, match="each must be 1 or more"):
            solve_frontier([exact], **arguments)
    with pytest.raises(UsageError, match="no latency for pattern 'branch'"):
        step_tables([BRANCH], {}, {})
    with pytest.raises(ValueError, match="over the age of memory, which it does not use"):
        table(POOL[3], 1.0, [[1.0]], source="memory")


@pytest.mark.parametrize("pruned", [True, False])
def test_fifty_steps_of_all_patterns(pruned: bool) -> None:
    from hybridiff_compiler.planner import Problem

    from .profiles import make_profile

    problem = Problem(make_profile(), 2, without=("trend", "half-trend") if pruned else ())
    tables = prune_dominated(problem.tables) if pruned else problem.tables
    found = solve_frontier(tables, 50)
    assert found.gap_s < 0.005 * found.latency_s[-1]
    assert found.simplified is not pruned
    assert len(found) > 100
