"""Contenders of equal cost: what they spend, that planning beats them by its own measure, and measuring them."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from planner.profiles import make_profile

from hybridiff_compiler.ir import InputError, PlanMismatchError, UsageError
from hybridiff_compiler.planner import PromptSamples
from hybridiff_compiler.quality.equal_cost import Judge, scheduler_levels, use_scheduler, with_noise_levels
from hybridiff_compiler.quality.prompt_samples import measure_prompts
from hybridiff_compiler.report.equal_cost_table import equal_cost_table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def judge():
    return Judge(None, make_profile(num_steps=24, max_age=3))


@pytest.mark.parametrize("speedup", [2.0, 2.5, 3.0, 4.0])
def test_contenders_spend_no_less_and_are_no_better(judge, speedup):
    planned = judge.planned(speedup)
    assert planned.work_speedup >= speedup - 1e-9
    names = []
    for row in judge.contenders(speedup):
        names.append(row.name)
        if not row.name.startswith("pipe"):
            assert row.work_speedup <= speedup + 1e-9
        if row.predicted_db is not None:  # what the planner finds for the contender's own cost
            rival = judge.planned(row.work_speedup)
            assert rival is not None
            assert (rival.predicted_db or math.inf) >= row.predicted_db - 1e-9, row.name
    if speedup == 2.5:
        assert {"paper", "paper, best start", "fewer steps", "alternating reuse"} <= set(names)
    if speedup == 2.0:
        assert sum(name.startswith("pipe:linear, warm-up") for name in names) == 9


def test_limits(judge):
    assert judge.planned(100.0) is None
    assert Judge(None, make_profile(num_steps=24, max_age=3), num_steps=12).planned(2.5).predicted_db is not None
    no_reuse = Judge(None, make_profile(num_steps=24, max_age=3), without=("reuse",)).planned(2.5)
    assert "reuse" not in no_reuse.steps
    four = Judge(None, make_profile(num_steps=12, max_age=2), gpus=4)
    assert four.planned(2.5).work_speedup >= 2.5 - 1e-9


def test_rows_are_measured(unet, profile):
    judge = Judge(unet, profile, prompts=["a cat", "a dog"], batch=2)
    planned = judge.measured(judge.planned(3.0))
    fewer = judge.measured(next(row for row in judge.contenders(3.0) if row.name == "fewer steps"))
    for row in (planned, fewer):
        assert row.psnr_db == pytest.approx(sum(row.per_prompt_db) / 2)
        assert row.psnr_db_min == min(row.per_prompt_db)
        assert 5 < row.psnr_db < 100
    exact = judge.measured(judge.planned(1.0))
    assert exact.psnr_db > 60  # one prompt per branch or both batched: numerics alone
    table = equal_cost_table(
        [vars(planned) | {"steps": 4}, vars(fewer) | {"steps": 2}], title="cost"
    )
    assert table.row_count == 2


def test_another_dtype_is_not_taken_for_the_schedule(unet, profile):
    signature = profile.model.signature
    leaves = tuple(
        leaf.model_copy(update={"dtype": "float16"}) if leaf.dtype == "float32" else leaf for leaf in signature.leaves
    )
    model = profile.model.model_copy(update={"signature": signature.model_copy(update={"leaves": leaves})})
    judge = Judge(unet, profile.model_copy(update={"model": model}), prompts=["a cat"], batch=1)
    with pytest.raises(PlanMismatchError, match="not covered by the profile"):
        judge.measure(judge.planned(2.5))


def test_prompts_are_sampled(unet, profile):
    judge = Judge(unet, profile, prompts=["a cat", "a dog", "a fox"], batch=2)
    samples = measure_prompts(judge, [2.5])
    assert PromptSamples.parse(samples.model_dump_json()) == samples
    assert [len(row) for row in samples.rel_mae] == [4, 4, 4]
    assert all(0 < value < 10 for row in samples.rel_mae for value in row)
    assert samples.psnr_db[0] == pytest.approx(judge.measure(judge.planned(2.5)), abs=1e-3)
    with pytest.raises(UsageError, match="no schedule reaches any of"):
        measure_prompts(judge, [1000.0])


def test_schedulers_change_by_name(unet):
    original = unet.scheduler
    try:
        assert use_scheduler(unet, None)(25) is None
        assert use_scheduler(unet, type(original).__name__)(25) is None
        levels = use_scheduler(unet, "DPMSolverMultistepScheduler")(25)
        assert len(levels) == 25
        assert list(levels) == sorted(levels, reverse=True)
        assert scheduler_levels(original, 50)[0] == pytest.approx(0.981)
        bare = make_profile(num_steps=24, max_age=2, scheduler=type(original).__name__)
        assert with_noise_levels(bare, unet) == bare  # another scheduler runs now
        unet.scheduler = original
        known = with_noise_levels(bare, unet)
        assert known.noise_levels == scheduler_levels(original, 24)
        assert with_noise_levels(known, unet) is known
        with pytest.raises(InputError, match="has no scheduler 'Magic'"):
            use_scheduler(unet, "Magic")
    finally:
        unet.scheduler = original


def test_the_table_is_printed_and_written(tmp_path):
    profile = make_profile(num_steps=12, max_age=2).save(tmp_path / "profile.json")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "equal_cost.py", profile, "bundled:unet", "--predict-only", "--speedup",
         "2.5", "-o", tmp_path / "table.json"],
        capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "alternating reuse" in done.stdout
    table = json.loads((tmp_path / "table.json").read_text())["tables"][0]
    assert table["reachable"]
    assert table["rows"][0]["name"] == "planned"
