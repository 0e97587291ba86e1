"""Wrong input: one clear line on stderr, the right exit code, nothing written."""

import json

import pytest

NO_WORK = [
    (["bake"], 2, "No such command 'bake'"),
    (["plan"], 2, "Missing argument 'PROFILE'"),
    (["plan", "{profile}"], 2, "give exactly one of min_psnr, speedup"),
    (["plan", "{profile}", "--policy", "exact", "--speedup", "2"], 2, "give exactly one"),
    (["plan", "{profile}", "--min-psnr", "30", "--gpus", "0"], 2, "'--gpus'"),
    (["plan", "{profile}", "--min-psnr", "30", "--gpus", "99"], 2, "got 99 GPUs"),
    (["plan", "{profile}", "--min-psnr", "much"], 2, "'--min-psnr'"),
    (["plan", "{profile}", "--min-psnr", "nan"], 2, "nan"),
    (["plan", "{profile}", "--speedup", "-1"], 2, "give a factor above 0"),
    (["plan", "{profile}", "--speedup", "90"], 1, "the fastest reaches"),
    (["plan", "{profile}", "--policy", "best"], 2, "choose from exact, paper"),
    (["plan", "{profile}", "--min-psnr", "30", "--without", "magic"], 2, "no family of cheap patterns"),
    (["plan", "{profile}", "--pareto", "--min-psnr", "30"], 2, "without a target"),
    (["plan", "{here}/none.json", "--min-psnr", "30"], 1, "no such file"),
    (["plan", "{exact}", "--min-psnr", "30"], 1, "not a valid profile"),
    (["plan", "{profile}", "--min-psnr", "30", "-o", "{here}/none/plan.json"], 1, "does not exist"),
    (["plan", "{profile}", "--min-psnr", "30", "-o", "{here}"], 1, "is a folder"),
    (["show", "{here}/none.json"], 1, "no such file"),
    (["show", "{exact}", "--trace", "{here}/t.json"], 2, "needs the times of a profile"),
    (["show", "{exact}", "--png", "{here}/p", "--html", "{here}/p"], 2, "give each its own"),
    (["show", "{exact}", "--png", "{here}/none/p.png"], 1, "does not exist"),
    (["show", "{profile}", "{profile}", "--png", "{here}/p.png"], 2, "draws a profile or a plan"),
    (["show", "{here}/" + 300 * "n"], 1, "File name too long"),
    (["plan", "{profile}", "--min-psnr", "30", "--steps", "1" + 20 * "0"], 2, "can be used for about"),
    (["run", "{exact}", "bundled:unet", "--prompt", "a cat", "-o", "{here}/image.gif"], 2, "no image format"),
    (["run", "{exact}", "bundled:unet", "--prompt", " ", "-o", "{here}/image.png"], 2, "empty --prompt"),
    (["run", "{exact}", "bundled:unet", "--prompt", "a cat", "-o", "{here}/none/image.png"], 1, "does not exist"),
    (["run", "{profile}", "bundled:unet", "--prompt", "a cat", "-o", "{here}/image.png"], 1, "not a valid plan"),
    (["run", "{exact}", "bundled:vae", "--prompt", "a cat", "-o", "{here}/image.png"], 2, "allowed: unet, mmdit"),
    (["run", "{exact}", "sdxl", "--prompt", "a cat", "-o", "{here}/image.png"], 2, "unknown model 'sdxl'"),
    (["run", "{exact}", "{here}/none", "--prompt", "a cat", "-o", "{here}/image.png"], 1, "no such folder"),
    (["run", "{exact}", "{here}", "--prompt", "a cat", "-o", "{here}/image.png"], 1, "no model_index.json"),
    (["profile", "bundled:unet", "-o", "{here}/none/p.json"], 1, "does not exist"),
    (["profile", "bundled:unet", "-o", "{here}/p.json", "--device", "tpu"], 2, "choose from cpu, cuda"),
    (["profile", "bundled:unet", "-o", "{here}/p.json", "--prompts", "{empty}"], 1, "holds no prompts"),
    (["profile", "bundled:unet", "-o", "{here}/p.json", "--prompts", "{here}/none.txt"], 1, "no such file"),
    (["profile", "bundled:unet", "-o", "{here}/p.json", "--steps", "1"], 2, "'--steps'"),
    (["verify", "{exact}", "bundled:unet", "-o", "{here}/none/r.json"], 1, "does not exist"),
    (["verify", "{exact}", "bundled:unet", "--min-psnr", "nan"], 2, "got --min-psnr nan"),
    (["run", "{exact}", "bundled:unet", "--prompt", "a", "-o", "{here}/i.png", "--guidance-scale", "inf"], 2,
     "got --guidance-scale inf"),
    (["run", "{exact}", "bundled:unet", "--prompt", "a", "-o", "{here}/i.png", "--height", "9"], 1,
     "refuses this call: `height` and `width` have to be divisible by 8"),
    (["profile", "bundled:unet", "-o", "{here}/p.json", "--dtype", "int8"], 2, "floating-point weights"),
    (["profile", "bundled:unet", "-o", "{here}/p.json", "--backend", "fast"], 2, "choose from eager, inductor"),
    (["profile", "bundled:unet", "-o", "{here}/p.json", "--costs-only", "--jobs", "99999"], 2, "'--jobs'"),
    (["compile", "{exact}", "bundled:mmdit", "--backend", "onnx", "-o", "{here}/b"], 1,
     "the plan was made for bundled:unet (UNet2DConditionModel), this is a SD3Transformer2DModel"),
    (["demo", "--models", "sdxl", "--out", "{here}/out"], 2, "allowed: unet, mmdit"),
    (["demo", "--models", ",", "--out", "{here}/out"], 2, "got no models"),
    (["demo", "--prompts", "0", "--out", "{here}/out"], 2, "'--prompts'"),
    (["demo", "--reprofile", "--profiles", "{here}", "--out", "{here}/out"], 2, "give one of them"),
    (["demo", "--out", "{empty}"], 1, "cannot be made"),
]


@pytest.fixture
def places(files, tmp_path):
    empty = files / "empty.txt"
    empty.write_text("\n \n")
    return {"profile": files / "profile.json", "exact": files / "exact.json", "empty": empty, "here": tmp_path}


@pytest.mark.parametrize(("arguments", "code", "text"), NO_WORK, ids=lambda value: " ".join(value)[:60]
                         if isinstance(value, list) else None)
def test_refused_before_any_work(hybridiff, places, arguments, code, text):
    ran = hybridiff(*[argument.format(**places) for argument in arguments])
    assert text in ran.error
    assert ran.code == code
    assert list(places["here"].iterdir()) == []


def damaged(kind, plan):
    if kind == "truncated":
        return json.dumps(plan)[:-200]
    if kind == "unknown pattern":
        plan["schedule"]["steps"][1] = "magic"
    if kind == "stale first step":
        plan["schedule"]["steps"][0] = next(s for s in plan["schedule"]["steps"] if s != "branch")
    if kind == "unknown field":
        plan["turbo"] = True
    if kind == "newer version":
        plan["schema_version"] = 2
    return json.dumps(plan)


@pytest.mark.parametrize(("kind", "text"), [
    ("truncated", "not valid JSON"), ("unknown pattern", "unknown patterns ['magic']"),
    ("stale first step", "step 0"), ("unknown field", "turbo"), ("newer version", "schema_version"),
])
def test_damaged_plans(hybridiff, files, tmp_path, kind, text):
    file = tmp_path / "plan.json"
    file.write_text(damaged(kind, json.loads((files / "cheap.json").read_text())))
    ran = hybridiff("run", file, "bundled:unet", "--prompt", "a cat", "-o", tmp_path / "image.png")
    assert text in ran.error
    assert ran.code == 1
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("command", "model", "options", "text"), [
    ("run", "bundled:mmdit", [], "made for a UNet2DConditionModel"),
    ("run", "bundled:unet", ["--steps", "9"], "has 4 steps, this generation 9"),
    ("run", "bundled:unet", ["--height", "96"], "does not fit this call"),
    ("run", "bundled:unet", ["--guidance-scale", "1"], "makes no guided denoiser calls"),
    ("verify", "bundled:mmdit", [], "made for a UNet2DConditionModel"),
    ("verify", "bundled:unet", ["--steps", "9"], "has 4 steps, this generation 9"),
])
def test_plans_for_another_generation(hybridiff, files, tmp_path, command, model, options, text):
    output = tmp_path / "out.png"
    prompt = ["--prompt", "a cat"]
    ran = hybridiff(command, files / "cheap.json", model, *prompt, "-o", output, *options)
    assert text in ran.error
    assert ran.code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_was_edited(hybridiff, files, tmp_path):
    """Same shapes, other graph: found when the ranks capture it; no process is left."""
    plan = json.loads((files / "cheap.json").read_text())
    plan["model"]["fingerprint"] = "0" * 64
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    ran = hybridiff("run", file, "bundled:unet", "--prompt", "a cat", "-o", tmp_path / "image.png")
    assert ran.code == 1
    assert "error: " in ran.err
    assert "profile this model and plan again" in ran.err
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", ["[]", "{}", '{"kind": "cake"}'])
def test_show_of_something_else(hybridiff, tmp_path, text):
    file = tmp_path / "file.json"
    file.write_text(text)
    assert "is no profile, plan or result of demo or bench" in hybridiff("show", file).error


def test_a_hub_id_that_cannot_be_reached(hybridiff, files, tmp_path):
    ran = hybridiff("run", files / "exact.json", "nobody/nothing", "--prompt", "a cat", "-o", tmp_path / "i.png")
    assert "nobody/nothing: cannot be loaded as a diffusers pipeline" in ran.error
    assert ran.code == 1


def test_unexpected_errors_are_one_line_too(hybridiff, files, monkeypatch):
    from hybridiff_compiler import planner

    def broken(*args, **kwargs):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(planner, "plan", broken)
    ran = hybridiff("plan", files / "profile.json", "--min-psnr", "30")
    assert "unexpected ZeroDivisionError: oops (set HYBRIDIFF_DEBUG=1" in ran.error
    monkeypatch.setenv("HYBRIDIFF_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        hybridiff("plan", files / "profile.json", "--min-psnr", "30")
