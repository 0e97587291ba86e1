"""The queue simulation against closed forms."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest

from hybridiff_compiler.ir import UsageError
from hybridiff_compiler.planner import simulate_queue


def mean_wait(service: float, groups: int, rate: float) -> float:
    """M/D/c (Crommelin, 1932): `sum_i e^-ia (sum_(j>=ic) (ia)^j/j! - c/a sum_(j>ic) (ia)^j/j!)` in service times."""
    load = rate * service
    total = 0.0
    for i in range(1, 400):
        mean = i * load
        below = [math.exp(j * math.log(mean) - mean - math.lgamma(j + 1)) for j in range(i * groups + 1)]
        from_ic, beyond = 1 - math.fsum(below[:-1]), 1 - math.fsum(below)
        total += from_ic - groups / load * beyond
    return service * total


def test_one_server_is_pollaczek_and_khinchine() -> None:
    for load in (0.3, 0.6, 0.8):
        found = simulate_queue(2.0, 1, load / 2.0, images=400_000, seed=1)
        assert found.mean_wait_s == pytest.approx(2.0 * load / (2 * (1 - load)), rel=0.05)
        assert mean_wait(2.0, 1, load / 2.0) == pytest.approx(2.0 * load / (2 * (1 - load)), rel=1e-3)
        assert found.utilisation == pytest.approx(load)


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("load", [0.5, 0.85])
def test_several_servers_are_crommelin(groups: int, load: float) -> None:
    rate = load * groups / 0.5
    found = simulate_queue(0.5, groups, rate, images=600_000, seed=2)
    assert found.mean_wait_s == pytest.approx(mean_wait(0.5, groups, rate), rel=0.08, abs=1e-5)


def test_taking_turns_is_first_come_first_served() -> None:
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.exponential(1 / 3.0, 500))
    free = [0.0] * 4
    expected = []
    for arrival in arrivals:
        start = max(arrival, heapq.heappop(free))
        heapq.heappush(free, start + 1.0)
        expected.append(start + 1.0 - arrival)
    found = simulate_queue(1.0, 4, 3.0, images=500, seed=3)
    np.testing.assert_allclose(found.response_s, expected[50:])
    assert found.percentile_s(95) == pytest.approx(np.percentile(expected[50:], 95))


def test_equal_seeds_give_equal_results() -> None:
    first, second, other = (simulate_queue(1.0, 2, 1.0, images=1000, seed=s) for s in (5, 5, 6))
    assert (first.response_s == second.response_s).all()
    assert (first.response_s != other.response_s).any()
    assert (first.response_s >= 1.0 - 1e-9).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1.0, 2, 2.0), "2 images/s are more than 2 groups of 1 s can make"), ((0.0, 2, 1.0), "must be above 0"),
     ((1.0, 0, 1.0), "must be above 0"), ((1.0, 1, -1.0), "must be above 0")],
)
def test_wrong_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        simulate_queue(*arguments)
