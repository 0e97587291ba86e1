"""The bundled models load offline through the stock pipelines and draw what depends on prompt and seed alone."""

import subprocess
import sys

import numpy as np
import pytest

from hybridiff_compiler import reference_models as bundled

WEIGHT_FILE_LIMIT = 16 * 2**20
STEPS = 3


@pytest.fixture(scope="module")
def pipelines():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield {name: bundled.load(name) for name in bundled.NAMES}


def _draw(pipeline, prompt="red apple", seed=0, **more):
    import torch

    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 5.0, **more}
    image = pipeline(prompt, generator=generator, **arguments).images[0]
    return np.asarray(image)


@pytest.mark.parametrize("name", bundled.NAMES)
def test_default_call_draws_a_64_pixel_picture(pipelines, name):
    picture = _draw(pipelines[name])
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 0


@pytest.mark.parametrize("name", bundled.NAMES)
def test_same_seed_same_picture_other_seed_other_picture(pipelines, name):
    more = {key: value for key, value in bundled.DEFAULTS[name].items() if key != "num_inference_steps"}
    first, again, other = (_draw(pipelines[name], seed=seed, **more) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", bundled.NAMES)
def test_prompt_matters(pipelines, name):
    assert not np.array_equal(_draw(pipelines[name], "red apple"), _draw(pipelines[name], "octopus"))


@pytest.mark.parametrize("name", bundled.NAMES)
def test_weights_run_in_float32_and_an_empty_prompt_is_encoded(pipelines, name):
    import torch

    pipeline = pipelines[name]
    dtypes = {p.dtype for m in pipeline.components.values() if isinstance(m, torch.nn.Module) for p in m.parameters()}
    assert dtypes == {torch.float32}
    assert pipeline.config.get("force_zeros_for_empty_prompt", False) is False


@pytest.mark.parametrize("prompts", [bundled.PROFILING_PROMPTS, bundled.HELD_OUT_PROMPTS])
def test_prompts_fit_the_tokenizer(pipelines, prompts):
    tokenizer = pipelines["unet"].tokenizer_2
    for prompt in prompts:
        tokens = tokenizer(prompt).input_ids
        assert len(tokens) <= tokenizer.model_max_length
        assert tokenizer.decode(tokens, skip_special_tokens=True) == prompt


def test_prompts_are_disjoint():
    profiling, held_out = set(bundled.PROFILING_PROMPTS), set(bundled.HELD_OUT_PROMPTS)
    assert (len(profiling), len(held_out)) == (24, 32)
    assert not profiling & held_out


@pytest.mark.parametrize("name", bundled.NAMES)
def test_every_weight_file_is_small(name):
    files = list(bundled.path(name).rglob("*.safetensors"))
    assert files
    assert max(file.stat().st_size for file in files) < WEIGHT_FILE_LIMIT


@pytest.mark.parametrize("call", [bundled.path, bundled.load])
def test_unknown_name_says_what_is_allowed(call):
    with pytest.raises(bundled.UnknownReferenceModel, match=r"'vit'.*unet, mmdit"):
        call("vit")


def test_import_does_not_import_diffusers():
    code = "import sys, hybridiff_compiler.reference_models; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
