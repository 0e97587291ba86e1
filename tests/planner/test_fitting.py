"""Plans within the memory of every rank."""

from __future__ import annotations

import pytest

from hybridiff_compiler.ir import TargetError, UsageError
from hybridiff_compiler.planner import frontier, plan

from .profiles import make_profile

PROFILE = make_profile(num_steps=16, max_age=3, depth=4)


def peaks(made: object) -> tuple[int, ...]:
    found = made.predictions.peak_bytes  # type: ignore[attr-defined]
    assert found is not None
    return found


@pytest.mark.parametrize("target", [{"min_psnr": 30.0}, {"speedup": 3.0}])
def test_the_best_plan_that_fits_is_found(target: dict[str, float]) -> None:
    free = plan(PROFILE, **target)  # type: ignore[arg-type]
    exact = plan(PROFILE, policy="exact")
    assert any(name not in ("branch", "reuse", "trend", "half-trend") for name in free.schedule.patterns)
    roomy = plan(PROFILE, **target, memory_bytes=max(peaks(free)))  # type: ignore[arg-type]
    assert roomy.schedule == free.schedule
    assert [rank.memory_bytes for rank in roomy.ranks] == [max(peaks(free))] * 2
    for limit in sorted({max(peaks(exact)), (max(peaks(exact)) + max(peaks(free))) // 2, max(peaks(free)) - 1}):
        made = plan(PROFILE, **target, memory_bytes=limit)  # type: ignore[arg-type]
        assert max(peaks(made)) <= limit
        assert made.predictions.psnr_db is not None
        assert made.predictions.latency_s is not None
        assert free.predictions.latency_s is not None
        # What needs no stage graphs always fits, so the plan is at least as good as the best of that.
        families = ("paper", "cond-pipe", "cond-pipe-unguided", "branch-reuse")
        small = plan(PROFILE, **target, without=families)  # type: ignore[arg-type]
        if "min_psnr" in target:
            assert free.predictions.latency_s <= made.predictions.latency_s + 1e-9
            assert made.predictions.latency_s <= small.predictions.latency_s + 1e-9  # type: ignore[operator]
        else:
            assert made.predictions.psnr_db >= small.predictions.psnr_db - 1e-9  # type: ignore[operator]


def test_what_does_not_fit_at_all_is_refused_with_what_is_needed() -> None:
    for arguments in ({"policy": "exact"}, {"policy": "paper"}, {"min_psnr": 30.0}):
        with pytest.raises(TargetError, match=r"need.* MiB on rank 0.*allowed are 0.0 MiB on rank 1.*nearest"):
            plan(PROFILE, **arguments, memory_bytes=(None, 1))  # type: ignore[arg-type]


def test_a_target_that_only_more_memory_reaches_is_refused() -> None:
    limit = max(peaks(plan(PROFILE, policy="exact")))
    fastest = frontier(PROFILE, 2)[0].speedup
    only_free = frontier(PROFILE, 2, ("paper", "cond-pipe", "cond-pipe-unguided", "branch-reuse"))[0].speedup
    assert fastest >= only_free
    with pytest.raises(TargetError, match="within the memory of the ranks"):
        plan(PROFILE, speedup=2 * fastest, memory_bytes=limit)


@pytest.mark.parametrize("limits", [(1 << 30,), (1, 2, 3), 0, (1 << 30, -1)])
def test_limits_must_suit_the_ranks(limits: object) -> None:
    with pytest.raises(UsageError, match="memory_bytes"):
        plan(PROFILE, policy="exact", memory_bytes=limits)  # type: ignore[arg-type]


