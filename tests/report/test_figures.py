"""Pictures and traces hold what the profile and the plan say."""

import json
from pathlib import Path

import pytest

from hybridiff_compiler.ir import Profile
from hybridiff_compiler.planner import plan
from hybridiff_compiler.planner.forecast import forecast
from hybridiff_compiler.report.figures import save_html, save_png
from hybridiff_compiler.report.plan_figures import save_trace, timeline_figure, without_times
from hybridiff_compiler.report.profile_figures import profile_figures

PROFILES = Path(__file__).parents[2] / "profiles"


@pytest.fixture(scope="module")
def measured():
    return Profile.load(PROFILES / "cpu" / "mmdit.json")


def titles(figures):
    return [figure.axes[0].get_title() for figure in figures]


def test_a_full_profile_has_every_figure(measured, tmp_path):
    figures = profile_figures(measured)
    words = ["discrepancy", "layers", "Image error", "Whole schedules", "Messages"]
    assert all(word in title for word, title in zip(words, titles(figures), strict=True))
    lines = figures[0].axes[0].get_lines()
    assert list(lines[0].get_ydata()) == pytest.approx(measured.guidance.mean)
    assert len(figures[3].axes[0].collections) == 2  # solved and random
    page = save_html(figures, tmp_path / "p.html", title="a <b>", text="x < y").read_text()
    assert page.count("<svg") == len(figures)
    assert "a &lt;b&gt;" in page
    assert "<script" not in page
    sheet = save_png(figures, tmp_path / "p.png")
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_a_profile_of_costs_has_times_and_links():
    assert len(profile_figures(Profile.load(PROFILES / "nvidia-h200-x2" / "sd3.json"))) == 2


def test_every_graph_is_a_bar(measured):
    made = plan(measured, policy="exact")
    by_step = without_times(made)
    assert [step.end_s for step in by_step.steps] == list(range(1, 51))
    bars = timeline_figure(made).axes[0].collections
    assert sum(len(bar.get_paths()) for bar in bars) == 100  # a branch on each of two ranks, 50 times
    times = forecast(measured, made, made.schedule.steps)
    axes = timeline_figure(made, times).axes[0]
    assert axes.get_xlim()[1] == pytest.approx(1e3 * made.predictions.latency_s)


def test_traces_can_be_read_again(measured, tmp_path):
    made = plan(measured, min_psnr=35, without=("reuse",))
    times = forecast(measured, made, made.schedule.steps)
    events = json.loads(save_trace(times, tmp_path / "t.json").read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X" and event["tid"] == 0]
    assert len(steps) == 50
    assert sum(event["dur"] for event in steps) == pytest.approx(1e6 * made.predictions.latency_s)
    lanes = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert lanes == {"steps", "rank 0", "rank 1"}
    launched = [event for event in events if event["ph"] == "X" and event["tid"] > 0]
    assert len(launched) == sum(len(step.spans) for step in times.steps)
