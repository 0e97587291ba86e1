"""Dividing GPUs between images."""

from __future__ import annotations

import pytest

from hybridiff_compiler.ir import InputError, Profile, TargetError, UsageError
from hybridiff_compiler.planner import frontier, plan, plan_fleet, simulate_queue


@pytest.fixture(scope="module")
def profile() -> Profile:
    from .profiles import make_profile

    return make_profile(num_steps=12, max_age=2)


def test_every_division_is_weighed(profile: Profile) -> None:
    fast, many = (plan_fleet(profile, gpus=4, objective=o, min_psnr=28) for o in ("latency", "throughput"))
    assert [o.gpus_per_image for o in fast.options] == [1, 2, 4]
    assert [o.images_at_once for o in fast.options] == [4, 2, 1]
    for option in fast.options:
        alone = plan(profile, gpus=option.gpus_per_image, min_psnr=28)
        assert option.plan.schedule == alone.schedule
        assert option.latency_s == alone.predictions.latency_s
        assert option.images_per_s == pytest.approx(option.images_at_once / option.latency_s)
        assert option.response_s is None
    assert fast.best.latency_s == min(o.latency_s for o in fast.options)
    assert many.best.images_per_s == max(o.images_per_s for o in many.options)
    assert plan_fleet(profile, gpus=1, min_psnr=28).best.gpus_per_image == 1


def test_groups_that_hold_one_model_together(profile: Profile) -> None:
    """The profile has a linear split into two stages only, and one GPU does not hold the model."""
    found = plan_fleet(profile, gpus=4, min_psnr=28, weights="stages")
    assert [(o.gpus_per_image, o.plan.weights) for o in found.options] == [(2, "stages")]
    with pytest.raises(TargetError, match="on 2 GPUs is predicted to be 99x"):
        plan_fleet(profile, gpus=4, speedup=99, weights="stages")
    with pytest.raises(UsageError, match="2 ranks or more"):
        plan_fleet(profile, gpus=1, min_psnr=28, weights="stages")
    with pytest.raises(InputError, match="needs a linear split into 3 stages"):
        plan_fleet(profile, gpus=3, min_psnr=28, weights="stages")
    with pytest.raises(InputError, match="no pattern errors"):
        plan_fleet(profile.model_copy(update={"errors": ()}), gpus=4, min_psnr=28)


def test_queueing_decides_where_images_arrive_at_random(profile: Profile) -> None:
    capacity = max(o.images_per_s for o in plan_fleet(profile, gpus=4, policy="exact").options)
    best = {}
    for share in (0.02, 0.97):
        found = plan_fleet(profile, gpus=4, objective="latency", arrival_rate=share * capacity, policy="exact")
        best[share] = found.best
        for option in found.options:
            assert option.utilisation == pytest.approx(share * capacity / option.images_per_s)
            if option.utilisation < 1:
                queue = simulate_queue(option.latency_s, option.images_at_once, share * capacity)
                assert option.response_s == pytest.approx(queue.percentile_s(95))
            else:
                assert option.response_s is None
        assert found.best.response_s == min(o.response_s for o in found.options if o.response_s is not None)
    assert best[0.02].latency_s < best[0.97].latency_s
    with pytest.raises(TargetError, match=r"are more than these GPUs can make: the most is"):
        plan_fleet(profile, gpus=4, arrival_rate=1.1 * capacity, policy="exact")


def test_sizes_that_miss_the_target_are_left_out(profile: Profile) -> None:
    limit = 1.001e3 * frontier(profile, 2)[0].latency_s
    assert limit < 1e3 * frontier(profile, 1)[0].latency_s
    found = plan_fleet(profile, gpus=2, max_latency_ms=limit)
    assert [o.gpus_per_image for o in found.options] == [2]
    with pytest.raises(TargetError, match="the fastest takes"):
        plan_fleet(profile, gpus=2, max_latency_ms=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"objective": "cost"}, "got objective 'cost'"), ({"percentile": 100}, "got percentile=100"),
     ({"arrival_rate": 0}, "got arrival_rate=0"), ({"gpus": 0}, "got 0 GPUs"), ({"policy": None}, "got targets: none")],
)
def test_wrong_arguments_are_named(profile: Profile, arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_fleet(profile, **({"gpus": 2, "policy": "exact"} | arguments))
