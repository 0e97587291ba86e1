"""AOTInductor packages: numbers, live weights, guards. What bundles add is tested in tests/bundle."""

from __future__ import annotations

import pytest
import torch

from hybridiff_compiler.backends.aotinductor import AotStage, _open_package
from hybridiff_compiler.backends.artifact import Job, strongest_backend
from hybridiff_compiler.backends.onnx_weights import OnnxWeights
from hybridiff_compiler.backends.stage_io import stage_inputs, stage_interface, stage_weights
from hybridiff_compiler.ir import InputError, PlanMismatchError, UsageError


@pytest.fixture(scope="session")
def package(need, small_stages, tmp_path_factory):
    """The second small stage as a package; inductor's own choice of a compiler would make it crash when opened."""
    backend, folder = need("aotinductor"), tmp_path_factory.mktemp("aot")
    static = tmp_path_factory.mktemp("toolchain") / "g++"
    static.write_text('#!/bin/sh\ncase " $* " in *" -shared "*) set -- -static-libstdc++ "$@";; esac\nexec g++ "$@"\n')
    static.chmod(0o755)
    job = Job(
        stage=small_stages[1], folder=folder, name="stage", target=backend.target("cpu", "float32", None),
        weights=OnnxWeights(folder),
    )
    cache = tmp_path_factory.mktemp("cache")
    with torch._inductor.config.patch({"cpp.cxx": (None, str(static))}), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        file = backend.build(job)
    assert list(folder.iterdir()) == [file]
    shared = [path for path in cache.rglob("*wrapper*") if path.is_file()]
    assert not shared, "builders of other stages could write the same files at the same time"
    return file


def test_numbers(package, need, small_stages, arguments):
    stage = small_stages[1]
    executable = need("aotinductor").load(package, stage_interface(stage))
    for seed in range(3):
        given = arguments(stage, seed)
        with torch.no_grad():
            for got, expected in zip(executable(*given), stage.module(*given), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_never_runs_without_weights(package, need, small_stages, arguments):
    stage = small_stages[1]
    small = [name for name in stage_weights(stage) if name.endswith("bias")]
    parts = {name: _open_package(package, model=name) for name in ("once", "timed", "model")}
    executable = AotStage(parts["model"], stage_inputs(stage), small)
    with pytest.raises(UsageError, match="no weights yet"):
        executable(*arguments(stage))
    weights = stage_weights(stage)
    hoisted = set(parts["once"].get_constant_fqns())
    assert hoisted == {"embed.weight"}, "what is made of the prompt alone"
    timed = set(parts["timed"].get_constant_fqns())
    assert timed == {"time.weight"}, "what is made of the timestep alone"
    assert set(executable.weight_names) | hoisted | timed == set(weights)
    some = {name: weights[name] for name in executable.weight_names[1:]}
    with pytest.raises(PlanMismatchError, match="reads 1 tensors that the denoiser lacks"):
        executable.bind(some)
    crooked = {name: torch.stack([tensor.detach()] * 2, -1)[..., 0] for name, tensor in weights.items()}
    with pytest.raises(InputError, match="not contiguous"):
        executable.bind(crooked)
    with pytest.raises(UsageError, match="no weights yet"):
        executable(*arguments(stage))
    executable = need("aotinductor").load(package, stage_interface(stage))
    assert len(executable(*arguments(stage))) == 1


@pytest.mark.parametrize("name", ["tail.bias", "blocks.5.conv.weight", "blocks.5.conv.bias", "tail.weight"])
def test_every_weight_is_live(package, need, small_stages, arguments, name):
    """Also those that inductor would write into the code: vectors of up to eight elements."""
    stage = small_stages[1]
    executable, given = need("aotinductor").load(package, stage_interface(stage)), arguments(stage)
    weight = stage_weights(stage)[name]
    kept = weight.detach().clone()
    with torch.no_grad():
        (before,) = executable(*given)
        weight.add_(0.5)
        (after,), (expected,) = executable(*given), stage.module(*given)
        weight.copy_(kept)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 0.01


def test_weights_are_not_in_the_package(package, small_stages):
    """Bytes of the largest weight are nowhere in the file (which is not compressed)."""
    largest = max(stage_weights(small_stages[1]).values(), key=torch.Tensor.numel)
    assert largest.detach().numpy().tobytes()[:64] not in package.read_bytes()


def test_wrong_arguments_are_refused(package, need, small_stages, arguments):
    stage = small_stages[1]
    executable, given = need("aotinductor").load(package, stage_interface(stage)), arguments(stage)
    for wrong in (given[:-1], [given[0].double(), *given[1:]], [given[0][:, :1], *given[1:]]):
        with pytest.raises(InputError, match="the stage"):
            executable(*wrong)


def test_targets(need):
    backend = need("aotinductor")
    with pytest.raises(UsageError, match="for this machine"):
        backend.target("cpu", "float32", "sm_89")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="this machine has none"):
            backend.target("cuda", "float16", None)
    assert strongest_backend("cpu") == "aotinductor"
