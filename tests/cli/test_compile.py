"""`hybridiff compile`, and the commands that take bundles."""

import json

import pytest
from PIL import Image

from hybridiff_compiler.backends.artifact import artifact_backend
from hybridiff_compiler.bundle import Bundle, Manifest
from hybridiff_compiler.ir import Plan
from hybridiff_compiler.quality.verify import Verification


def test_compile_show_run(hybridiff, files, tmp_path):
    missing = artifact_backend("onnx").missing()
    if missing is not None:
        pytest.skip(f"onnx {missing}")
    plan = Plan.load(files / "exact.json")
    exact = plan.model_copy(update={"patterns": tuple(p for p in plan.patterns if p.name == plan.exact)})
    folder = tmp_path / "bundle"
    ran = hybridiff("compile", exact.save(tmp_path / "plan.json"), "bundled:unet", "--backend", "onnx", "-o", folder,
                    "--json")
    assert ran.code == 0, ran.err
    assert Manifest.parse(ran.out) == Bundle.open(folder).manifest
    assert Manifest.parse(hybridiff("show", folder, "--json").out) == Bundle.open(folder).manifest
    text = hybridiff("show", folder).out
    assert {"weights.bin", "plan.json", "graphs.json"} <= set(text.split())
    assert "onnx for cpu any" in text

    image = tmp_path / "cat.png"
    ran = hybridiff("run", folder, "bundled:unet", "--prompt", "a cat", "-o", image, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["executed"] == list(plan.schedule.steps)
    assert Image.open(image).size == (64, 64)

    ran = hybridiff("verify", folder, "bundled:unet", "--prompt", "a cat", "--repeats", "1", "--json")
    assert ran.code == 0, ran.err
    report = Verification.model_validate_json(ran.out)
    assert (report.simulator_max_abs_diff, report.split_batch_max_abs_diff) == (0, None)
    assert report.max_abs_diff < 1e-2, "another batch size and other kernels, the same image"

    (folder / "weights.bin").write_bytes(b"")
    for arguments in (("show", folder), ("run", folder, "bundled:unet", "--prompt", "a cat", "-o", image)):
        ran = hybridiff(*arguments)
        assert ran.code == 1
        assert "the manifest says" in ran.error


@pytest.mark.parametrize(("options", "code", "message"), [
    (("--backend", "tvm"), 2, "unknown backend 'tvm'"),
    (("--backend", "tensorrt-rtx", "--target", "sm_89"), 2, "the plan is for ranks on 'cpu'"),
    (("--backend", "aotinductor", "--target", "sm_89"), 2, "for this machine"),
])
def test_refusals(hybridiff, files, tmp_path, options, code, message):
    ran = hybridiff("compile", files / "exact.json", "bundled:unet", "-o", tmp_path / "bundle", *options)
    assert ran.code == code
    assert message in ran.error
    assert not (tmp_path / "bundle").exists()


def test_output_is_checked_first(hybridiff, files, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    ran = hybridiff("compile", files / "exact.json", "bundled:unet", "-o", tmp_path)
    assert ran.code == 1
    assert "is no bundle" in ran.error
    assert (tmp_path / "notes.txt").read_text() == "mine"
