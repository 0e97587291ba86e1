import json

import pytest
from planner.profiles import make_profile

from hybridiff_compiler.ir import Broadcast, LayerTiming, Link
from hybridiff_compiler.report import describe_diff, describe_profile, diff_profiles

from .test_report import printed


def changed(profile, layers=None, spread=None, **costs):
    if layers is not None:
        costs["layers"] = {b: tuple(layers * s for s in times) for b, times in profile.costs.layers.items()}
    if spread is not None:
        costs["timing"] = LayerTiming(
            method="wall", spread={b: (spread,) * len(t) for b, t in profile.costs.layers.items()},
            stage_residual=0.08, fitted_residual=0.01, rounds=2, settled=True, raw_sum={1: 1.03}, whole_s={1: 0.02},
        )
    return profile.model_copy(update={"costs": profile.costs.model_copy(update=costs)})


def test_equal_profiles_have_no_changes():
    profile = make_profile(links=True)
    diff = diff_profiles(profile, profile)
    assert diff.same_denoiser
    assert diff.about == ()
    for table in (diff.totals, diff.layers, diff.stages, diff.links, diff.guidance, diff.errors):
        assert table
        assert all(change.relative in (0, None) for change in table)


def test_changes_are_relative_to_the_first():
    first = make_profile(links=True)
    slower = changed(first, layers=1.5, links=tuple(
        link.model_copy(update={"bytes_per_s": 2e9}) for link in first.costs.links
    ))
    diff = diff_profiles(first, slower)
    assert [change.relative for change in diff.layers] == pytest.approx([0.5] * len(diff.layers))
    assert diff.totals[0].relative == pytest.approx(0.5)
    rates = [change.relative for change in diff.links if "GB/s" in change.name]
    assert rates == pytest.approx([1.0] * len(rates))
    text = printed(*describe_diff(diff))
    assert "+50.0%" in text
    assert "+100.0%" in text
    assert json.loads(json.dumps(diff.to_json()))["layers"][0]["relative"] == pytest.approx(0.5)


def test_what_only_one_has_is_shown_without_a_change():
    diff = diff_profiles(make_profile(), make_profile(links=True))
    assert all(change.first is None and change.relative is None for change in diff.links)
    assert "1 -> 0, GB/s" in printed(*describe_diff(diff))


def test_other_denoisers_are_compared_by_name():
    diff = diff_profiles(make_profile(), make_profile(depth=6))
    assert not diff.same_denoiser
    assert "different denoisers" in printed(*describe_diff(diff))


@pytest.mark.parametrize(("factor", "within"), [(1.04, 1.0), (1.2, 0.0)])
def test_a_repeated_profile_is_judged_by_the_stated_spread(factor, within):
    first = changed(make_profile(), spread=0.05)
    again = diff_profiles(first, changed(first, layers=factor, spread=0.05)).repeated
    assert again.layers_within == pytest.approx(within)
    assert again.stages_within == again.stages > 0
    assert diff_profiles(make_profile(), first).repeated is None


def test_a_profile_shows_timing_and_links():
    profile = changed(
        make_profile(links=True), spread=0.05, transport="nccl",
        links=(Link(source=0, target=1, latency_s=1e-5, bytes_per_s=2e11, spread=0.1, residual=0.02),),
        broadcasts=(Broadcast(root=0, ranks=2, latency_s=2e-5, bytes_per_s=1e11),),
    )
    text = printed(*describe_profile(profile))
    for words in ("host clock between layers", "103.0% at batch 1", "up to 8.0%", "settled after 2 rounds",
                  "links over nccl", "0 -> 1", "200.00", "0 -> all 2"):
        assert words in text
    estimated = profile.model_copy(update={
        "provenance": profile.provenance.model_copy(update={"estimated": "roofline: made up"})
    })
    assert "ESTIMATED" in printed(*describe_profile(estimated))
