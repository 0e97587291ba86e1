"""Profiles at other numbers of steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.ir import ErrorCurve, Guidance, PatternErrors, Profile, UsageError
from hybridiff_compiler.planner import at_steps, noise_levels_of, plan
from hybridiff_compiler.planner.rescale import DRIFT_DB

from .profiles import make_profile


def smooth(num_steps: int, max_age: int = 8) -> Profile:
    """A profile whose error is `distance * rate(position) * step size`, exactly what `at_steps` assumes."""
    profile = make_profile(num_steps=num_steps, max_age=max_age)
    size = 1 / num_steps
    rate = 2 - (np.arange(num_steps) + 0.5) * size
    age = np.arange(1, max_age + 1) * size
    rmse = tuple(map(tuple, (rate[:, None] * age[None, :] * size).tolist()))
    errors = tuple(
        PatternErrors(
            pattern=e.pattern, curves=tuple(ErrorCurve(source=c.source, gap=c.gap, rmse=rmse) for c in e.curves)
        )
        for e in profile.errors
    )
    curve = tuple((0.5 - 0.3 * (np.arange(num_steps) + 1) * size).tolist())
    return profile.model_copy(update={"errors": errors, "guidance": Guidance(rel_mae=(curve, curve))})


def curves(profile: Profile, name: str = "branch-reuse:nested") -> np.ndarray:
    return np.array(profile.errors_by_pattern[name].curves[0].rmse)


@pytest.mark.parametrize("steps", [20, 25, 40, 80, 100])
def test_errors_by_distance_are_those_of_a_profile_at_that_number(steps: int) -> None:
    derived, direct = at_steps(smooth(50), steps), smooth(steps, max_age=12)
    assert derived.num_steps == steps
    got, want = curves(derived), curves(direct)[:, : curves(derived).shape[1]]
    assert got.shape == (steps, min(12, int(8 * steps / 50)))
    inside = slice(0, steps - max(2, steps // 20))  # at the end the steps reach beyond the last profiled one
    np.testing.assert_allclose(got[inside], want[inside], rtol=0.06)
    assert derived.guidance is not None
    assert direct.guidance is not None
    np.testing.assert_allclose(derived.guidance.mean[1:-2], direct.guidance.mean[1:-2], atol=1e-6)
    assert derived.compounding.residual_db == pytest.approx(
        np.hypot(smooth(50).compounding.residual_db, DRIFT_DB * abs(np.log2(50 / steps)))
    )
    Profile.parse(derived.model_dump_json())


def test_shorter_steps_make_staleness_cheaper() -> None:
    quality = [plan(smooth(50), speedup=2.2, num_inference_steps=n).predictions.psnr_db for n in (25, 50, 100)]
    assert quality[0] is not None
    assert quality == sorted(quality)


def test_the_profile_itself_where_nothing_changes() -> None:
    profile = make_profile(num_steps=10, max_age=2)
    assert at_steps(profile) is profile
    assert at_steps(profile, 10) is profile
    levels = noise_levels_of(profile)
    assert levels == pytest.approx(np.linspace(1, 0.1, 10))
    again = at_steps(profile, noise_levels=levels)
    np.testing.assert_allclose(curves(again), curves(profile))
    assert again.noise_levels == pytest.approx(levels)


def test_mirrored_patterns_keep_the_error_of_lost_guidance() -> None:
    profile = smooth(20)
    rmse = tuple((0.3, 0.4, 0.5) for _ in range(20))
    flat = tuple(
        PatternErrors(
            pattern=e.pattern, curves=tuple(ErrorCurve(source=c.source, gap=c.gap, rmse=rmse) for c in e.curves)
        )
        for e in profile.errors
    )
    finer = at_steps(profile.model_copy(update={"errors": flat}), 40)
    assert curves(finer, "paper:nested")[10, 0] == pytest.approx((0.2 + 0.05) / 2)  # half a step, age one half
    assert curves(finer)[10, 0] == pytest.approx(0.15 / 2)


def test_image_to_image_is_the_end_of_the_trajectory() -> None:
    profile = smooth(50)
    part = at_steps(profile, strength=0.3)
    assert part.num_steps == 15
    np.testing.assert_allclose(curves(part), curves(profile)[35:], rtol=1e-6)
    assert at_steps(profile, 100, strength=0.3).num_steps == 30


def test_spacing_follows_the_recorded_levels() -> None:
    leading = smooth(50).model_copy(update={"noise_levels": tuple((981 - 20 * i) / 1000 for i in range(50))})
    assert at_steps(leading, 25).noise_levels == pytest.approx([(961 - 40 * i) / 1000 for i in range(25)])
    flow = smooth(50).model_copy(update={"noise_levels": tuple(np.linspace(1, 0.001, 50).tolist())})
    assert at_steps(flow, 25).noise_levels == pytest.approx(np.linspace(1, 0.001, 25))
    assert at_steps(flow, 100).noise_levels == pytest.approx(np.linspace(1, 0.001, 100))


def test_levels_of_another_scheduler_find_their_place() -> None:
    profile = smooth(50)
    dense_at_the_end = np.concatenate([np.linspace(1.0, 0.5, 6), np.linspace(0.4, 0.04, 10)])
    made = at_steps(profile, noise_levels=dense_at_the_end.tolist())
    assert made.num_steps == 16
    first, later = curves(made)[2, 0], curves(made)[12, 0]
    rate = 2 - (1 - dense_at_the_end)
    assert first == pytest.approx(rate[2] * 0.1 * 0.1, rel=0.1)
    assert later == pytest.approx(rate[12] * 0.04 * 0.04, rel=0.1)


@settings(max_examples=60, deadline=None)
@given(st.integers(10, 100), st.floats(0.2, 1.0))
def test_derived_profiles_are_valid(steps: int, strength: float) -> None:
    profile = make_profile(num_steps=30, max_age=4)
    if int(steps * strength) < 3:
        return
    derived = at_steps(profile, steps, strength=strength)
    again = Profile.parse(derived.model_dump_json())
    assert again.num_steps == int(steps * strength)
    assert len(again.noise_levels) == (0 if derived is profile else again.num_steps)  # it recorded none
    assert list(again.noise_levels) == sorted(again.noise_levels, reverse=True)
    assert min(curves(again).min(), curves(again, "reuse").min(), curves(again, "trend").min()) >= 0


@pytest.mark.parametrize("steps", [10, 25, 50])
def test_trends_of_longer_steps_look_further_back(steps: int) -> None:
    profile = make_profile(num_steps=50, max_age=8, noise=0)
    (errors,) = [each for each in profile.errors if each.pattern == "trend"]
    known = {curve.gap: np.array(curve.rmse) for curve in errors.curves}
    (derived,) = [each for each in at_steps(profile, steps).errors if each.pattern == "trend"]
    found = {curve.gap: np.array(curve.rmse) for curve in derived.curves}
    coarser = 50 // steps
    assert set(found) == {gap for gap in known if gap * coarser <= 4} or set(found) == {1}
    for gap, rmse in found.items():
        expected = known[min(4, gap * coarser)][25, coarser - 1] * coarser
        assert rmse[steps // 2, 0] == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 2}, "got 2 steps; a schedule needs at least 3"),
        ({"num_steps": 4, "strength": 0.2}, "got 0 steps"),
        ({"num_steps": 9}, "got 9 steps; a profile of 50 steps can be used for about 10 to 200"),
        ({"strength": 1.2}, "got strength=1.2"),
        ({"noise_levels": [0.9, 0.95, 0.1]}, "must decrease"),
        ({"noise_levels": []}, "must decrease"),
        ({"noise_levels": [0.9, 0.5, 0.1]}, "times as far apart as those of the profile"),
        ({"num_steps": 10**20}, "got 100000000000000000000 steps"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        at_steps(make_profile(max_age=2), **arguments)
