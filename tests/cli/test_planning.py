"""`hybridiff plan` and `hybridiff show` beyond one fixed plan: frontiers, fleets, other steps, explanations."""

import json

import pytest

from hybridiff_compiler.ir import Plan, Profile, SwitchedSchedule
from hybridiff_compiler.planner import PromptSamples, plan


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory):
    from planner.profiles import make_profile

    profile = make_profile(num_steps=16, max_age=2)
    spread = profile.compounding.model_copy(update={"prompt_std_db": 3.0, "prompts": 24})
    file = tmp_path_factory.mktemp("planning") / "profile.json"
    profile.model_copy(update={"compounding": spread}).save(file)
    return file


def test_targets_from_the_same_frontier(hybridiff, profile_file):
    points = json.loads(hybridiff("plan", profile_file, "--pareto", "--quantile", "0.1", "--json").out)["frontier"]
    assert points[0]["psnr_quantile_db"] == pytest.approx(points[0]["psnr_db"] - 1.2816 * 3, abs=1e-2)
    limit = 1e3 * points[len(points) // 2]["latency_s"] * 1.0001
    made = Plan.parse(hybridiff("plan", profile_file, "--max-latency-ms", limit, "--json").out)
    assert str(made.schedule) == points[len(points) // 2]["schedule"]
    text = hybridiff("plan", profile_file, "--min-psnr", "24", "--quantile", "0.1").out
    assert "dB or more for 90% of prompts" in text
    assert "x in denoiser evaluations" in text
    assert "over all schedules of the candidate patterns" in text


def test_infeasible_targets_name_the_nearest(hybridiff, profile_file):
    ran = hybridiff("plan", profile_file, "--min-psnr", "40", "--speedup", "4")
    assert ran.code == 1
    assert "the nearest are" in ran.error
    assert "dB at 4x, and 40 dB at " in ran.error


def test_frontier_plots(hybridiff, profile_file, tmp_path):
    png, html = tmp_path / "f.png", tmp_path / "f.html"
    ran = hybridiff("plan", profile_file, "--pareto", "--png", png, "--html", html, "--quantile", "0.05")
    assert ran.code == 0, ran.err
    assert png.read_bytes()[:4] == b"\x89PNG"
    page = html.read_text()
    assert page.startswith("<!doctype html>\n")
    assert "<svg" in page
    assert "<script" not in page
    assert hybridiff("plan", profile_file, "--min-psnr", "30", "--png", png).code == 2


def test_other_steps_and_work(hybridiff, profile_file):
    made = Plan.parse(hybridiff(
        "plan", profile_file, "--steps", "10", "--speedup", "2.5", "--costs", "work", "--json").out)
    assert made.num_steps == 10
    assert made.predictions.work_speedup >= 2.5
    assert Plan.parse(
        hybridiff("plan", profile_file, "--strength", "0.5", "--min-psnr", "24", "--json").out).num_steps == 8


def test_fleet(hybridiff, profile_file, tmp_path):
    output = tmp_path / "plan.json"
    arguments = ("plan", profile_file, "--gpus", "4", "--min-psnr", "26", "-o", output)
    answer = json.loads(hybridiff(*arguments, "--objective", "throughput", "--json").out)
    best = answer["options"][answer["best"]]
    assert best["images_per_s"] == max(option["images_per_s"] for option in answer["options"])
    assert Plan.parse(json.dumps(best["plan"])) == Plan.load(output)
    rate = 0.5 * best["images_per_s"]
    ran = hybridiff(*arguments, "--arrival-rate", rate, "--percentile", "90")
    assert ran.code == 0, ran.err
    assert "90 % of images within s" in ran.out
    assert hybridiff(*arguments, "--arrival-rate", 100 * rate).code == 1
    assert hybridiff(*arguments, "--objective", "money").code == 2
    assert hybridiff("plan", profile_file, "--pareto", "--objective", "latency").code == 2


def test_adaptive_plan(hybridiff, profile_file, tmp_path):
    from planner import test_switching

    profile = Profile.load(profile_file)
    made = test_switching.samples_of(profile, noise=0.1)
    PromptSamples(**(dict(made) | {"num_steps": 16, "rel_mae": tuple(row[:16] for row in made.rel_mae)})).save(
        tmp_path / "samples.json")
    ran = hybridiff(
        "plan", profile_file, "--min-psnr", "31", "--adaptive", tmp_path / "samples.json", "-o", tmp_path / "p.json")
    assert ran.code == 0, ran.err
    assert isinstance(Plan.load(tmp_path / "p.json").schedule, SwitchedSchedule)
    assert "switched by" in ran.out
    assert "switched by" in hybridiff("show", tmp_path / "p.json").out


def test_show_explains(hybridiff, profile_file, tmp_path):
    file = plan(Profile.load(profile_file), min_psnr=34).save(tmp_path / "plan.json")
    text = hybridiff("show", file, "--profile", profile_file).out
    assert "what the cheap steps buy and cost" in text
    assert "what binds is quality: 34 dB asked for" in text
    answer = json.loads(hybridiff("show", file, "--profile", profile_file, "--json").out)
    assert Plan.parse(json.dumps(answer["plan"])) == Plan.load(file)
    assert answer["explanation"]["runs"][0]["saved_ms"] > 0
    assert hybridiff("show", profile_file, "--profile", profile_file).code == 2
