"""A whole profiling session on the bundled models with few steps: what it must hold, and what it refuses."""

import itertools
import math

import pytest
import torch

import hybridiff_compiler as hc
from hybridiff_compiler.ir import InputError, PlanMismatchError, Profile, UsageError
from hybridiff_compiler.profiler.attribution import weighted
from hybridiff_compiler.profiler.errors import ErrorMeasurement, ErrorSettings
from hybridiff_compiler.profiler.grid import QUICK
from hybridiff_compiler.profiler.partial import Partial
from hybridiff_compiler.profiler.timing import pinned_threads, time_together

STEPS = 6


def measure(bench, prompts=("a cat", "a dog"), **changes):
    arguments = {"num_inference_steps": STEPS, "name": bench.name, "threads": 1, "quick": True, "gpus": (2,)}
    arguments |= {"helpers": 0, "trends": True} | bench.options | changes
    return hc.profile(bench.pipe, prompts=list(prompts), **arguments)


@pytest.fixture(scope="module")
def profile(bench):
    stages = set()
    measured = measure(
        bench, guidance_scale=(5.0, 3.0), on_progress=lambda stage, done, total: stages.add((stage, done <= total)),
    )
    assert {stage for stage, _ in stages} >= {"capture", "layer times", "stage times", "whole schedules"}
    assert all(inside for _, inside in stages)
    return measured


def test_profile_is_complete(bench, profile):
    assert profile.num_steps == STEPS
    assert profile.model.fingerprint == profile.graph.fingerprint()
    assert {p.name for p in profile.partitions} >= {"linear", "nested"}
    assert {batch: len(times) for batch, times in profile.costs.layers.items()} == {
        1: len(profile.graph.layers), 2: len(profile.graph.layers)
    }
    assert all(time > 0 for times in profile.costs.layers.values() for time in times)
    whole = profile.costs.stage_seconds("whole", (0,), 1)
    assert whole > 0
    assert profile.costs.stage_seconds("whole", (0,), 2) > whole
    assert len(profile.guidance.rel_mae) == 2
    assert len(profile.noise_levels) == STEPS
    assert all(1 >= a > b > 0 for a, b in itertools.pairwise(profile.noise_levels))
    assert [guidance.scale for guidance in profile.further_guidance] == [3.0]
    assert profile.further_guidance[0].rel_mae != profile.guidance.rel_mae
    assert {len(row) for row in profile.redundancy.change.values()} == {STEPS - 1}
    assert set(profile.redundancy.mean) == {value.name for value in profile.graph.values}
    assert profile.sampling.prompts == 2
    assert (profile.compounding.prompts, profile.compounding.checks) == (2, ()), "two prompts make one block"
    assert profile.compounding.prompt_std_db > 0
    cheap = {p.name for p in profile.patterns if not p.is_exact}
    assert set(profile.errors_by_pattern) == cheap
    assert all(value > 0 for e in profile.errors for c in e.curves for row in c.rmse for value in row)
    assert profile.compounding.schedules > 0
    assert profile.provenance.prompts == 2
    assert profile.provenance.device_type == "cpu"


def test_profile_survives_its_file(profile, tmp_path):
    assert Profile.load(profile.save(tmp_path / "profile.json")) == profile


def test_profile_yields_plans(profile):
    plan = hc.plan(profile, gpus=2, min_psnr=20)
    assert plan.predictions.psnr_db is None or plan.predictions.psnr_db >= 20
    assert hc.plan(profile, gpus=2, policy="exact").is_exact


def test_equal_seeds_give_equal_curves(bench, profile):
    """Tables follow measured times, so they are taken from the profile; everything else is measured again."""
    measurement = ErrorMeasurement(
        bench.generation(STEPS), ["a cat", "a dog"], bench.denoiser, profile.model.signature, profile.partitions,
        profile.patterns, ErrorSettings(probes=2, grid=QUICK), Partial(None, {}),
    )
    with torch.no_grad():
        for parameter in bench.denoiser.parameters():
            parameter.requires_grad_(False)
    try:
        curves = measurement.curves()
    finally:
        for parameter in bench.denoiser.parameters():
            parameter.requires_grad_(True)
    assert curves.guidance == profile.guidance
    cut = curves.redundancy.change
    assert cut
    assert cut == {name: profile.redundancy.change[name] for name in cut}
    by_name = {pattern.name: pattern for pattern in profile.patterns}
    assert weighted(curves.errors, by_name, profile.sampling.weights) == profile.errors


class Stop(Exception):
    """Ends a session in the middle."""


def test_a_stopped_session_continues(bench, tmp_path):
    if bench.name != "unet":
        pytest.skip("one model is enough")
    file = tmp_path / "p.json.partial"

    def stop(stage, done, total):
        if stage == "whole schedules" and done == 1:
            raise Stop

    few = {"prompts": ["a cat"], "num_inference_steps": 4, "gpus": (1,), "partial": file}
    with pytest.raises(Stop):
        measure(bench, on_progress=stop, **few)
    assert file.exists()
    with pytest.raises(PlanMismatchError, match="its seed is 0, this one's is 1"):
        measure(bench, seed=1, **few)
    stages = []
    finished = measure(bench, on_progress=lambda stage, done, total: stages.append(stage), **few)
    assert any(stage.startswith(f"continuing {file}") for stage in stages)
    assert not {"layer times", "stage times", "recording", "propagation to the image"} & set(stages)
    assert finished.compounding.schedules > 1
    assert not file.exists()
    assert all(parameter.requires_grad for parameter in bench.denoiser.parameters())


def test_errors_can_come_from_another_device(bench, profile):
    taken = measure(bench, errors_from=profile)
    assert (taken.errors, taken.compounding, taken.partitions) == (
        profile.errors, profile.compounding, profile.partitions
    )
    assert taken.errors_provenance == profile.provenance
    with pytest.raises(PlanMismatchError, match="its steps is 6, this pipeline's is 5"):
        measure(bench, errors_from=profile, num_inference_steps=5)


def test_the_pipeline_is_left_as_it_was(bench, profile):
    plain = bench.image(steps=3)
    assert torch.isfinite(plain).all()
    assert "set_timesteps" not in vars(bench.pipe.scheduler)
    assert all(parameter.requires_grad for parameter in bench.denoiser.parameters())


def test_bad_input_is_refused(bench):
    with pytest.raises(UsageError, match="got no prompts"):
        measure(bench, prompts=())
    with pytest.raises(UsageError, match="got 2 steps"):
        measure(bench, num_inference_steps=2)
    with pytest.raises(InputError, match="no classifier-free-guidance call"):
        measure(bench, guidance_scale=1.0)


def test_generations_that_are_not_numbers_are_refused(bench):
    if bench.name != "mmdit":
        pytest.skip("one model is enough")
    parameter = next(bench.denoiser.parameters())
    kept = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.fill_(math.nan)
        with pytest.raises(InputError, match=r"latents of \['a cat'\] of an exact generation are not finite"):
            measure(bench)
    finally:
        with torch.no_grad():
            parameter.copy_(kept)


def test_timing_takes_turns_and_reports_medians():
    calls = []
    slow, fast = (lambda: sum(range(20000)), lambda: calls.append(1))
    timings = time_together([slow, fast], torch.device("cpu"), rounds=5)
    assert timings[0].median > timings[1].median > 0
    assert timings[0].spread >= 0


def test_threads_are_restored():
    before = torch.get_num_threads()
    with pinned_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_the_same_tables_and_seed_give_the_same_errors(bench, profile):
    """With the cuts of another profile nothing of the errors depends on how long anything took, nor on how many
    processes shared the work."""
    if bench.name != "unet":
        pytest.skip("one model is enough")
    stages = set()
    again = measure(bench, cuts_from=profile, helpers=1, on_progress=lambda stage, done, total: stages.add(stage))
    assert not [stage for stage in stages if "process" in stage], "a helper was missing"
    assert again.partitions == profile.partitions
    assert (again.errors, again.guidance, again.compounding) == (profile.errors, profile.guidance, profile.compounding)
    with pytest.raises(PlanMismatchError, match="another denoiser"):
        measure(bench, cuts_from=profile.model_copy(
            update={"model": profile.model.model_copy(update={"fingerprint": "0" * 64})}
        ))
