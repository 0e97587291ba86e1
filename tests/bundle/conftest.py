"""One small plan, compiled once per session with every backend that runs on a CPU."""

from __future__ import annotations

import shutil

import pytest
import torch

from hybridiff_compiler.backends.artifact import artifact_backend
from hybridiff_compiler.bundle import Bundle, Manifest, write_bundle

from .small import PlainPipeline, small_plan


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pipe():
    """The pipeline that the bundles are for."""
    return PlainPipeline()


@pytest.fixture(scope="session")
def plan(pipe):
    """Its plan: two graphs on two ranks."""
    return small_plan(pipe)


@pytest.fixture(scope="session")
def compiled(pipe, plan, tmp_path_factory):
    """`compiled(backend)`: a bundle that tests must not change; a backend that is not installed skips the test."""
    bundles = {}

    def get(backend):
        missing = artifact_backend(backend).missing()
        if missing is not None:
            pytest.skip(f"{backend} {missing}")
        if backend not in bundles:
            folder = tmp_path_factory.mktemp("bundles") / backend
            bundles[backend] = write_bundle(plan, pipe.denoiser, folder, backend=backend)
        return bundles[backend]

    return get


@pytest.fixture
def copy(compiled, tmp_path):
    """The folder of a bundle to be damaged."""
    return shutil.copytree(compiled("onnx").folder, tmp_path / "bundle")


@pytest.fixture
def reseal():
    """`reseal(folder, **fields)`: give the bundle a manifest with other fields and a right seal."""

    def write(folder, **fields):
        manifest = Manifest.load(folder / "manifest.json")
        changed = manifest.model_copy(update={**fields, "seal": ""})
        changed = changed.model_copy(update={"seal": changed.digest()})
        changed.save(folder / "manifest.json")
        return Bundle.open(folder)

    return write
