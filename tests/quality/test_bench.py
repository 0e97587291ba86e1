"""`hybridiff bench` on stock pipelines of shrunken architectures, on CPU ranks."""

import runpy
from pathlib import Path

import pytest
import torch

import hybridiff_compiler as hc
from hybridiff_compiler.ir import InputError, PlanMismatchError, UsageError
from hybridiff_compiler.quality import architectures
from hybridiff_compiler.quality.bench import MANY_ROWS, ROWS, Bench, bench_results, predicted_seconds
from hybridiff_compiler.quality.overheads import watched_pipeline
from hybridiff_compiler.runtime.intercept import find_denoiser

SMALL_SDXL = architectures.SDXL_UNET | {
    "sample_size": 8, "block_out_channels": (32, 32, 32), "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (4, 4, 4), "cross_attention_dim": 2048, "norm_num_groups": 8,
}
SMALL_SD3 = architectures.SD3_TRANSFORMER | {
    "sample_size": 8, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16,
    "pos_embed_max_size": 16,
}


SMALL_VAE = {
    "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 16,
    "scaling_factor": 1.5, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(architectures, "VAES", {"sd3": (SMALL_VAE, "float32")})
    monkeypatch.setattr(architectures, "SDXL_UNET", SMALL_SDXL)
    monkeypatch.setattr(architectures, "SD3_TRANSFORMER", SMALL_SD3)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_rows_of_random_architectures(name):
    model = architectures.random_model(name, device="cpu", dtype=torch.float32, vae=name == "sd3")
    rows = ROWS if name == "sd3" else ("single-eager", "branch", "planned-reuse")
    bench = Bench(model.pipe, model.options(64, 0), name=name, pixels=64, steps=6, repeats=1, threads=1, rows=rows)
    with bench.open() as measure:
        measured = tuple(measure())
    assert tuple(row.name for row in measured) == rows
    by_name = {row.name: row for row in measured}
    assert by_name["single-eager"].speedup_vs_eager == 1
    assert by_name["branch"].patterns == {"branch": 6}
    assert by_name["branch"].bytes_per_step > 1000
    assert by_name["branch"].stage_s["branch"] > 0
    assert by_name["planned-reuse"].stage_s["reuse"] == 0
    assert by_name["single-eager"].overhead_fraction is None
    assert by_name["planned-reuse"].patterns == {"branch": 4, "reuse": 2}
    if name == "sd3":
        assert by_name["single-compiled"].speedup_vs_strong == 1
        assert by_name["paper"].patterns["paper:nested"] >= 1
    for row in measured:
        assert row.predicted_peak_gib is None, "of GPUs only"
        if name == "sd3":
            assert row.end_to_end_s > 0
            assert row.decode == "pipeline"
        else:
            assert (row.end_to_end_s, row.decode) == (None, None), "no VAE"
    results = bench_results({name: measured}, device="cpu", gpus=2, seed=0, random_weights=True)
    assert results.to_json()["models"][name]["rows"][0]["pixels"] == 64
    assert results.to_json()["schema"] == 1


def test_rows_of_four_ranks():
    model = architectures.random_model("sd3", device="cpu", dtype=torch.float32)
    rows = ("branch", *MANY_ROWS)
    bench = Bench(
        model.pipe, model.options(64, 0), name="sd3", pixels=64, steps=5, gpus=4, repeats=1, threads=1, rows=rows
    )
    with bench.open() as measure:
        by_name = {row.name: row for row in measure()}
    assert tuple(by_name) == rows
    assert [row.ranks for row in by_name.values()] == [2, 4, 4, 4]
    assert by_name["branch-pipe"].patterns == {"branch": 2, "branch-pipe:nested": 3}
    assert by_name["pipe"].patterns == {"branch": 2, "pipe:nested": 3}
    assert by_name["planned-many"].patterns["reuse"] == 2
    assert by_name["pipe"].bytes_per_step > 0


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="sdxl, sd3"):
        architectures.random_model("dalle", device="cpu", dtype=torch.float32)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            architectures.random_model("sd3", device="cuda", dtype=torch.float16)
    model = architectures.random_model("sd3", device="cpu", dtype=torch.float32)
    with pytest.raises(UsageError, match="unknown rows"):
        Bench(model.pipe, {}, name="sd3", pixels=64, rows=("fastest",))
    with pytest.raises(UsageError, match="are for 2"):
        Bench(model.pipe, {}, name="sd3", pixels=64, gpus=1, rows=("branch",))
    with pytest.raises(UsageError, match="are for 4"):
        Bench(model.pipe, {}, name="sd3", pixels=64, gpus=3, rows=("pipe",))


def test_rows_are_predicted_from_a_profile():
    """The bench runs the profile's partitions, and its rows are what the cost model says of them."""
    model = architectures.random_model("sd3", device="cpu", dtype=torch.float32)
    call = {
        "hidden_states": torch.zeros(1, 16, 8, 8), "encoder_hidden_states": torch.zeros(1, 333, 4096),
        "pooled_projections": torch.zeros(1, 2048), "timestep": torch.zeros(1), "return_dict": False,
    }
    profile = hc.profile_costs(
        model.pipe.transformer, call=call, name="sd3", num_inference_steps=6, quick=True, threads=1, max_seconds=0.0
    )
    bench = Bench(
        model.pipe, model.options(64, 0), name="sd3", pixels=64, steps=6, repeats=1, threads=1, rows=("branch",),
        profile=profile,
    )
    with bench.open() as measure:
        (row,) = measure()
    assert row.predicted_s == pytest.approx(predicted_seconds(profile, {"branch": 6}))
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "check_latency.py"))
    (found,) = tool["compare"]("sd3", [row.model_dump()], profile)
    assert found["deviation"] == pytest.approx(row.predicted_s / row.loop_s - 1)
    assert found["same_partitions"]
    other = profile.model_copy(update={"model": profile.model.model_copy(update={"fingerprint": "0" * 64})})
    refused = Bench(
        model.pipe, model.options(64, 0), name="sd3", pixels=64, steps=6, rows=("branch",), threads=1, profile=other
    ).open()
    with pytest.raises(PlanMismatchError, match="another denoiser"):
        refused.__enter__()


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_what_a_pipeline_adds_to_a_step(name):
    """The stock pipeline runs around a given denoiser."""
    model = architectures.random_model(name, device="cpu", dtype=torch.float32)
    denoiser = find_denoiser(model.pipe)[1]
    watched = watched_pipeline(name, denoiser, pixels=64)
    assert watched.step_overhead() > 0
    assert "Euler" in watched.scheduler
    assert watched_pipeline("wan", denoiser) is None
