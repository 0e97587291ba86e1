import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hybridiff_compiler.ir import AdaptiveSchedule, InputError, Pattern, Profile, Redundancy, UsageError
from hybridiff_compiler.report import (
    ModelResults,
    Results,
    Row,
    count_patterns,
    describe_plan,
    describe_profile,
    image_grid,
    letters,
    representative_steps,
    results_table,
    strip,
    text_plot,
    timeline,
    to_image,
)

ROW = Row(
    name="planned-35", ranks=2, steps=4, patterns={"branch": 3, "reuse": 1}, latency_s=0.5, speedup=3.0,
    ideal_speedup=3.2, work_speedup=3.5, predicted_speedup=3.1,
    psnr_db=35.5, psnr_db_min=31.0, predicted_psnr_db=36.0, max_abs_diff=0.25,
)
EXACT = Row(name="branch", ranks=2, steps=4, patterns={"branch": 4}, max_abs_diff=0.0)
RESULTS = Results(device="a CPU", models={"unet": ModelResults(rows=(EXACT, ROW))})


def printed(*parts, width=160):
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    for part in parts:
        console.print(part)
    return stream.getvalue()


def test_letters_are_unique_and_known_families_keep_theirs():
    names = ["branch", "single", "reuse", "branch-reuse:nested", "branch-reuse:thin", "branch-reuse:linear", "mine"]
    alphabet = letters(names)
    assert len(set(alphabet.values())) == len(names)
    assert (alphabet["branch"], alphabet["single"], alphabet["reuse"]) == ("B", "S", ".")
    assert strip(["branch", "reuse", "branch"], alphabet) == "B.B"


def test_counts_and_representative_steps():
    schedule = AdaptiveSchedule(num_steps=10, warmup="branch", window="paper", history=2, eps=1e-3, k=2, tau_cap=5)
    assert count_patterns(representative_steps(schedule)) == {"branch": 8, "paper": 2}


def test_json_has_the_shape_that_benchmarks_keep():
    payload = json.loads(json.dumps(RESULTS.to_json()))
    assert list(payload) == ["schema", "device", "models"]
    assert list(payload["models"]["unet"]) == ["rows"]
    assert list(payload["models"]["unet"]["rows"][1]) == [
        "name", "ranks", "steps", "patterns", "latency_s", "speedup", "ideal_speedup", "work_speedup",
        "predicted_speedup", "psnr_db", "psnr_db_min", "predicted_psnr_db", "max_abs_diff",
    ]
    assert payload["schema"] == 1
    assert payload["models"]["unet"]["rows"][0]["psnr_db"] is None
    assert Results.parse(payload, source="x") == RESULTS


def test_a_damaged_result_is_refused(tmp_path):
    payload = RESULTS.to_json()
    payload["models"]["unet"]["rows"][0]["ranks"] = 0
    with pytest.raises(InputError, match=r"x: not a valid benchmark result: models.unet.rows.0.ranks"):
        Results.parse(payload, source="x")
    assert json.loads(RESULTS.save(tmp_path / "r.json").read_text()) == RESULTS.to_json()


def test_results_table():
    text = printed(results_table("title", RESULTS.models["unet"]))
    line = next(line for line in text.splitlines() if "planned-35" in line)
    assert line.split() == [
        "planned-35", "4", "B", "3", ".", "1", "0.500", "3.00x", "3.20x", "3.50x", "3.10x", "35.5", "31.0", "36.0",
        "2.5e-01",
    ]
    exact = next(line for line in text.splitlines() if line.split()[:1] == ["branch"])
    assert exact.split()[-9:] == ["-"] * 8 + ["0"]


def test_text_plot():
    plot = text_plot([0.0, 1.0, 2.0], height=3)
    assert [line[:14].rstrip() for line in plot.splitlines()[:3]] == [
        "        2 ┤  •", "        1 ┤ •", "        0 ┤•",
    ]
    assert len(text_plot(list(range(1000)), width=61).splitlines()[-2]) == 61
    assert text_plot([]) == "(no values)"
    assert "•••" in text_plot([0.0, 0.0, 0.0])


def test_timeline_shows_what_each_rank_does(profile, cheap_plan):
    reuse, branch = Pattern.parse("reuse", "- | last"), Pattern.parse("branch", "u0@0 c0@1 | cfg")
    pipe = next(pattern for pattern in profile.patterns if pattern.name.startswith("cond-pipe:"))
    fields = dict(cheap_plan) | {"patterns": (branch, reuse, pipe), "partitions": profile.partitions}
    plan = type(cheap_plan)(**fields | {"schedule": cheap_plan.with_steps(("branch",) * 4).schedule})
    plan = plan.with_steps(("branch", pipe.name, "reuse", "branch"))
    top, first, second = timeline(plan).splitlines()
    assert top.partition("│")[2] == "Bc.B│"
    assert first.partition("│")[2] == "u0 u│"
    assert second.partition("│")[2] == "c1 c│"


def test_timeline_and_plot_keep_their_columns_in_narrow_terminals(cheap_plan):
    plan = cheap_plan.with_steps(("branch",) * 90)
    for width in (40, 60, 80):
        lines = printed(*describe_plan(plan), width=width).splitlines()
        blocks = [line.partition("│")[2] for line in lines if "rank 1 │" in line]
        assert sum(len(block) - 1 for block in blocks) == 90
        assert len(blocks) == -(-90 // (width - 13))


def test_descriptions_hold_the_tables(profile, cheap_plan, exact_plan):
    text = printed(*describe_profile(profile))
    assert "conv_in" in text
    assert "u0@0(c1~) c1@1(u0~) | mirror" in text
    assert "random weights" in text
    assert "rel-MAE" in text
    text = printed(*describe_plan(cheap_plan))
    assert str(cheap_plan.schedule) in text
    assert "rank 1 │" in text
    assert "branch*4" in printed(*describe_plan(exact_plan))
    assert "idle:" not in printed(*describe_plan(exact_plan))
    wide = exact_plan.model_copy(update={"ranks": exact_plan.ranks * 2})
    assert "no step computes anything on rank 2, 3: fewer GPUs do as well" in printed(*describe_plan(wide))


def test_a_profile_says_what_its_cuts_lose(profile):
    assert "KiB x change" not in printed(*describe_profile(profile))
    steps = profile.num_steps - 1
    change = {value.name: (0.02 * (1 + k % 5),) * steps for k, value in enumerate(profile.graph.values)}
    text = printed(*describe_profile(profile.model_copy(update={"redundancy": Redundancy(change=change)})))
    assert "stale KiB x change" in text
    # With the change of every value known, a split that bytes alone would choose stands beside those of the profile.
    names = profile.graph.names
    first = profile.partitions[0].model_copy(update={"stages": (names[:1], names[1:])})
    others = (first, *profile.partitions[1:])
    text = printed(*describe_profile(profile.model_copy(update={
        "redundancy": Redundancy(change=change), "partitions": others,
    })))
    assert "linear, by bytes alone" in text
    shipped = Profile.load(Path(__file__).parents[2] / "profiles" / "cpu" / "unet.json")  # has measured errors
    assert "the one that loses less was measured to err less in" in printed(*describe_profile(shipped))


def test_image_grid():
    batch = torch.rand(2, 3, 8, 8)
    picture = image_grid({"single": batch, "planned-30": batch}, ["a cat", "a dog"], title="t")
    tiles = [to_image(batch[0]).getpixel((0, 0))]
    assert tiles[0] in {picture.getpixel((150, y)) for y in range(picture.height)}
    with pytest.raises(UsageError, match="2 images for 1 prompts"):
        image_grid({"single": batch}, ["a cat"])
