"""Random schedules: valid, distinct, reproducible, spread over the range that was asked for."""

import math

from hybridiff_compiler.planner import Problem
from hybridiff_compiler.planner.sampling import random_schedules, trial_schedules
from planner.profiles import make_profile


def test_random_schedules_are_valid_and_distinct():
    problem = Problem(make_profile(), 2)
    drawn = random_schedules(problem, 12, seed=3)
    assert len({steps for steps, _ in drawn}) == 12
    for steps, error in drawn:
        assert steps[0] == steps[-1] == problem.exact.name
        assert math.isclose(problem.error(steps), error)
    assert drawn == random_schedules(problem, 12, seed=3)
    assert drawn != random_schedules(problem, 12, seed=4)


def test_only_wanted_ones_come():
    problem = Problem(make_profile(), 2)
    errors = sorted(error for _, error in random_schedules(problem, 20))
    middle = errors[10]
    assert all(error > middle for _, error in random_schedules(problem, 5, wanted=lambda error: error > middle))
    assert random_schedules(problem, 5, wanted=lambda error: False) == []


def test_trials_are_of_both_kinds():
    trials = trial_schedules(make_profile(), random=4)
    kinds = [kind for _, kind in trials]
    assert kinds.count("random") == 4
    assert kinds.count("solved") >= 1
    assert len({steps for steps, _ in trials}) == len(trials)


def test_trials_do_not_mix_what_disturbs_each_other():
    profile = make_profile()
    problem = Problem(profile, 2)
    drawn = random_schedules(problem, 40, seed=1, mixed=False)
    assert any(any(name.startswith("paper") for name in steps) for steps, _ in drawn)
    for steps, _ in drawn:
        if any(name.startswith("paper") for name in steps):
            assert not any(name.startswith(("cond-pipe", "branch-reuse")) for name in steps)
