"""The timeline of a plan is what its predicted latency is made of."""

from itertools import pairwise

import pytest

from hybridiff_compiler.ir import Costs, Link, PlanMismatchError, RankSpec
from hybridiff_compiler.planner import plan
from hybridiff_compiler.planner.forecast import forecast

from .profiles import make_profile

PROFILE = make_profile()
LINKED = PROFILE.model_copy(update={"costs": Costs.model_validate(dict(PROFILE.costs) | {
    "step_overhead_s": 0.01,
    "links": [Link(source=a, target=1 - a, latency_s=0.002, bytes_per_s=1e6) for a in (0, 1)],
})})


@pytest.mark.parametrize("profile", [PROFILE, LINKED], ids=["free", "linked"])
@pytest.mark.parametrize("target", [{"policy": "exact"}, {"min_psnr": 25.0}, {"min_psnr": 20.0, "without": ("reuse",)}])
def test_steps_add_up_to_the_predicted_latency(profile, target) -> None:
    made = plan(profile, **target)
    times = forecast(profile, made, made.schedule.steps)
    assert times.seconds == pytest.approx(made.predictions.latency_s)
    assert [step.pattern for step in times.steps] == list(made.schedule.steps)
    now = 0.0
    for step in times.steps:
        assert step.start_s == pytest.approx(now)
        now = step.end_s
        assert all(step.start_s <= span.start_s <= span.end_s <= step.end_s + 1e-12 for span in step.spans)
        for rank in range(times.ranks):
            own = sorted((span.start_s, span.end_s) for span in step.spans if span.segment.rank == rank)
            assert all(later[0] >= earlier[1] - 1e-12 for earlier, later in pairwise(own)), "one graph at a time"


def test_slower_ranks_take_longer() -> None:
    made = plan(PROFILE, policy="exact")
    slow = made.model_copy(update={"ranks": (RankSpec(device="cpu"), RankSpec(device="cpu", speed=0.5))})
    first = forecast(PROFILE, slow, slow.schedule.steps).steps[0]
    lasted = {span.segment.rank: span.end_s - span.start_s for span in first.spans}
    assert lasted[1] == pytest.approx(2 * lasted[0])


def test_another_denoisers_profile_is_refused() -> None:
    made = plan(PROFILE, policy="exact")
    other = made.model_copy(update={"model": made.model.model_copy(update={"fingerprint": "0" * 64})})
    with pytest.raises(PlanMismatchError, match="give the profile that the plan is from"):
        forecast(PROFILE, other, other.schedule.steps)
