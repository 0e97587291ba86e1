"""Plans within the memory of every rank."""

from __future__ import annotations

import numpy as np
import pytest

from hybridiff_compiler.ir import Profile, TargetError, UsageError
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
        with pytest.raises(TargetError, match=r"need.* MiB on rank 0.*allowed are 0.0 MiB on rank 0, 0.0.*nearest"):
            plan(PROFILE, **arguments, memory_bytes=1)  # type: ignore[arg-type]


def test_where_only_the_driver_has_room_it_works_alone() -> None:
    needed = peaks(plan(PROFILE, policy="exact"))
    for target in ({"policy": "exact"}, {"min_psnr": 200.0}):
        made = plan(PROFILE, **target, memory_bytes=(None, needed[1] - 1))  # type: ignore[arg-type]
        assert set(made.schedule.patterns) == {made.exact} == {"single"}
        assert peaks(made)[1] < needed[1]


def busy(seed: int) -> Profile:
    """A profile whose layers take up memory."""
    rng = np.random.default_rng(seed)
    profile = make_profile(num_steps=6, max_age=2, depth=3, seed=seed)
    layers = tuple(
        layer.model_copy(update={"traffic_bytes": int(rng.integers(30_000))}) for layer in profile.graph.layers
    )
    return profile.model_copy(update={"graph": profile.graph.model_copy(update={"layers": layers})})


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("target", [{"speedup": 9.0}, {"min_psnr": 60.0, "speedup": 2.5}])
def test_the_nearest_that_an_error_names_can_be_had(seed: int, target: dict[str, float]) -> None:
    """Tables that fit one by one need not fit together."""
    profile = busy(seed)
    for without in ((), ("reuse", "trend", "half-trend")):
        exact = peaks(plan(profile, policy="exact"))
        largest = np.max([peaks(plan(profile, min_psnr=psnr, without=without)) for psnr in (10, 30, 50)], axis=0)
        for share in (0.0, 0.3, 0.6, 0.9):
            limits = [round(a + share * (b - a)) for a, b in zip(exact, largest.tolist())]
            with pytest.raises(TargetError, match="within the memory of the ranks") as refusal:
                plan(profile, **target, without=without, memory_bytes=limits)  # type: ignore[arg-type]
            message = str(refusal.value)
            if "the fastest reaches" in message:
                nearest = [{"speedup": float(message.split("the fastest reaches ")[1].split("x")[0])}]
            else:
                better, faster = message.split("the nearest are ")[1].split(", and ")
                nearest = [
                    {"min_psnr": float(better.split(" dB")[0]), "speedup": target["speedup"]},
                    {"min_psnr": target["min_psnr"], "speedup": float(faster.split(" at ")[1].split("x")[0])},
                ]
            for each in nearest:
                made = plan(profile, **each, without=without, memory_bytes=limits)  # type: ignore[arg-type]
                assert all(peak <= limit for peak, limit in zip(peaks(made), limits))


def test_plans_for_work_fit_where_they_run() -> None:
    """On unequal ranks, work and time put the units of one table on different ranks."""
    profile, without = busy(0), ("reuse", "trend", "half-trend")
    options = {"min_psnr": 40, "costs": "work", "speeds": (1.0, 2.0), "without": without}
    needed = peaks(plan(profile, **options))  # type: ignore[arg-type]
    exact = peaks(plan(profile, policy="exact"))
    for share in (0.2, 0.5, 0.8):
        limits = tuple(round(a + share * (b - a)) for a, b in zip(exact, needed))
        made = plan(profile, **options, memory_bytes=limits)  # type: ignore[arg-type]
        assert all(peak <= limit for peak, limit in zip(peaks(made), limits))


def test_a_target_that_only_more_memory_reaches_is_refused() -> None:
    limit = max(peaks(plan(PROFILE, policy="exact")))
    fastest = frontier(PROFILE, 2)[0].speedup
    only_free = frontier(PROFILE, 2, ("paper", "cond-pipe", "cond-pipe-unguided", "branch-reuse"))[0].speedup
    assert fastest >= only_free
    with pytest.raises(TargetError, match="within the memory of the ranks"):
        plan(PROFILE, speedup=2 * fastest, memory_bytes=limit)


@pytest.mark.parametrize("limits", [(1 << 30,), (1, 2, 3), 0, (1 << 30, -1), 1e9, (1 << 30, 1.5)])
def test_limits_must_suit_the_ranks(limits: object) -> None:
    with pytest.raises(UsageError, match="memory_bytes"):
        plan(PROFILE, policy="exact", memory_bytes=limits)  # type: ignore[arg-type]


