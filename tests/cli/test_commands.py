"""The commands doing their work, people's and machines' output."""

import json

import pytest
from PIL import Image

from hybridiff_compiler.cli import shipped
from hybridiff_compiler.cli.prompts import choose_prompts
from hybridiff_compiler.ir import InputError, Plan, Profile
from hybridiff_compiler.quality.verify import Verification


def test_plan_writes_what_json_prints(hybridiff, files, tmp_path):
    output = tmp_path / "plan.json"
    ran = hybridiff("plan", files / "profile.json", "--speedup", "2.5", "--without", "reuse", "-o", output, "--json")
    assert ran.code == 0
    printed = Plan.parse(ran.out)
    assert printed == Plan.load(output)
    assert "reuse" not in {pattern.name for pattern in printed.patterns}


def test_plan_for_unequal_ranks(hybridiff, files):
    asked = ("plan", files / "profile.json", "--speedup", "1.5", "--rank-speeds", "1,0.5", "--rank-memory", "1GiB,2GiB")
    ran = hybridiff(*asked, "--json")
    assert ran.code == 0
    assert [(rank.speed, rank.memory_bytes) for rank in Plan.parse(ran.out).ranks] == [(1, 2**30), (0.5, 2**31)]
    for wrong in (("--rank-speeds", "fast"), ("--rank-memory", "4X"), ("--rank-memory", "1GiB,1GiB,1GiB")):
        assert hybridiff("plan", files / "profile.json", "--policy", "exact", *wrong).code == 2
    assert hybridiff("plan", files / "profile.json", "--policy", "exact", "--rank-memory", "1KiB").code == 1


def test_plan_for_people(hybridiff, files):
    ran = hybridiff("plan", files / "profile.json", "--policy", "paper")
    assert ran.code == 0
    assert "adaptive branch -> paper" in ran.out
    assert "rank 1 │" in ran.out


def test_frontier(hybridiff, files):
    points = json.loads(hybridiff("plan", files / "profile.json", "--pareto", "--json").out)["frontier"]
    speedups = [point["speedup"] for point in points]
    assert speedups == sorted(speedups, reverse=True)
    assert points[-1]["psnr_db"] is None
    assert "schedules" in hybridiff("plan", files / "profile.json", "--pareto").out


@pytest.mark.parametrize(("name", "kind"), [("profile.json", Profile), ("cheap.json", Plan)])
def test_show(hybridiff, files, name, kind):
    assert kind.parse(hybridiff("show", files / name, "--json").out) == kind.load(files / name)
    text = hybridiff("show", files / name).out
    assert "u0@0 c0@1 | cfg" in text


def test_show_draws(hybridiff, files, tmp_path):
    png, html, trace = tmp_path / "p.png", tmp_path / "p.html", tmp_path / "t.json"
    ran = hybridiff(
        "show", files / "cheap.json", "--profile", files / "profile.json", "--png", png, "--html", html,
        "--trace", trace,
    )
    assert ran.code == 0
    assert ran.out.count("wrote ") == 3
    assert png.read_bytes().startswith(b"\x89PNG")
    page = html.read_text()
    assert page.count("<svg") == 2  # by step, and by time
    assert "timeline" in page
    assert json.loads(trace.read_text())["traceEvents"]
    ran = hybridiff("show", files / "profile.json", "--png", png, "--json")
    assert json.loads(ran.out)["kind"] == "profile"


def test_run(hybridiff, files, tmp_path):
    output = tmp_path / "cat.png"
    ran = hybridiff("run", files / "cheap.json", "bundled:unet", "--prompt", "a cat", "-o", output, "--json")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    plan = Plan.load(files / "cheap.json")
    assert answer["executed"] == list(plan.schedule.steps)
    assert answer["ranks"] == 2
    assert Image.open(output).size == (64, 64)
    assert list(tmp_path.iterdir()) == [output]


def test_verify(hybridiff, files, tmp_path):
    output = tmp_path / "report.json"
    ran = hybridiff("verify", files / "exact.json", "bundled:unet", "--limit", "1", "--repeats", "1", "--json", "-o",
                    output)
    assert ran.code == 0, ran.err
    report = Verification.model_validate_json(ran.out)
    assert report == Verification.model_validate_json(output.read_text())
    assert (report.split_batch_max_abs_diff, report.simulator_max_abs_diff) == (0, 0)


def test_verify_fails_below_the_quality_asked_for(hybridiff, files):
    ran = hybridiff("verify", files / "cheap.json", "bundled:unet", "--prompt", "a cat", "--simulate", "--repeats",
                    "1", "--min-psnr", "99")
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith("error: mean PSNR is ")
    assert "a cat" in ran.out


def test_shipped_profiles_are_found_in_a_checkout_and_in_a_package(tmp_path, monkeypatch):
    package = tmp_path / "site" / "hybridiff_compiler"
    monkeypatch.setattr(shipped, "__file__", str(package / "cli" / "shipped.py"))
    with pytest.raises(InputError, match="no measured profiles"):
        shipped.shipped_profile("unet")
    for root in (package.parent, package):
        folder = root / "profiles" / "cpu"
        folder.mkdir(parents=True)
        (folder / "unet.json").write_text("{}")
        assert shipped.shipped_profile("unet") == folder / "unet.json"
        with pytest.raises(InputError, match="no measured profile of 'mmdit' on cpu"):
            shipped.shipped_profile("mmdit")


def test_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\n\n a fox \n")
    assert choose_prompts(["a cat"], file, default=("x",), limit=2) == ["a cat", "a dog"]
    assert choose_prompts(None, None, default=("x", "y"), limit=None) == ["x", "y"]


def test_two_profiles_are_compared(hybridiff, files):
    ran = hybridiff("show", files / "profile.json", files / "profile.json")
    assert ran.code == 0
    assert "all layers, batch 1" in ran.out
    refused = hybridiff("show", files / "profile.json", files / "exact.json")
    assert refused.code == 1
    assert "not a valid profile" in refused.error


def test_costs_of_an_architecture_and_its_estimate(hybridiff, tmp_path):
    measured, estimate = tmp_path / "costs.json", tmp_path / "estimate.json"
    common = ["--random-weights", "--quick"]
    ran = hybridiff("profile", "pixart-tiny", *common, "--costs-only", "--link", "12,260", "--json", "-o", measured)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["prompts"] == 0
    ran = hybridiff("profile", "pixart-tiny", *common, "--estimate", "rtx3090", "-o", estimate)
    assert ran.code == 0, ran.err
    assert "ESTIMATED" in ran.out
    assert hybridiff("plan", estimate, "--policy", "exact", "-o", tmp_path / "plan.json").code == 0
    assert "no peak figures" in hybridiff(
        "profile", "pixart-tiny", *common, "--estimate", "rtx3090", "--fit", measured, "-o", estimate).error
    assert "add --costs-only" in hybridiff("profile", "sd3-tiny", "--random-weights", "-o", measured).error
    assert "add --estimate" in hybridiff("profile", "bundled:unet", "--fit", measured, "-o", estimate).error


@pytest.mark.parametrize("name", ["bench.json", "bench-2048.json", "decode.json"])
def test_show_prints_what_bench_wrote(hybridiff, name):
    from hybridiff_compiler.cli.shipped import profiles_root

    file = profiles_root() / "nvidia-h200-x2" / name
    ran = hybridiff("show", file)
    assert (ran.code, ran.err) == (0, "")
    assert "sdxl on NVIDIA H200, random weights: latency only" in ran.out
    assert json.loads(hybridiff("show", file, "--json").out) == json.loads(file.read_text())


def test_show_says_what_it_prints(hybridiff, tmp_path):
    (tmp_path / "report.json").write_text('{"psnr_db": 3}')
    assert "is no profile, plan or result of demo or bench" in hybridiff("show", tmp_path / "report.json").error
