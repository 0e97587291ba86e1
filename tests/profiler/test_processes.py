"""Numbers of processes that only exhaust a machine are refused."""

import pytest

from hybridiff_compiler.api import profile_costs
from hybridiff_compiler.ir import UsageError
from hybridiff_compiler.profiler import processes


@pytest.mark.parametrize(("cores", "count"), [(1, 9), (4, 17), (4, -1), (64, 257)])
def test_more_than_a_machine_bears(monkeypatch, cores, count):
    monkeypatch.setattr(processes, "own_cores", lambda: cores)
    with pytest.raises(UsageError, match=f"got jobs={count}; on this machine of {cores} cores it must be between 0"):
        processes.check_count("jobs", count)
    processes.check_count("jobs", 8)


def test_asked_for_before_any_work():
    with pytest.raises(UsageError, match="got jobs=100000"):
        profile_costs(None, jobs=100_000)
