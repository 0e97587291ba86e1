"""Bundles of engines for another machine's GPU, written where there is none."""

from __future__ import annotations

import pytest
import torch

from hybridiff_compiler.backends.artifact import artifact_backend
from hybridiff_compiler.bundle import Bundle, write_bundle
from hybridiff_compiler.ir import PlanMismatchError, RankSpec, UsageError


def test_engines_for_a_gpu_that_is_not_here(pipe, plan, tmp_path):
    missing = artifact_backend("tensorrt-rtx").missing()
    if missing is not None:
        pytest.skip(f"tensorrt-rtx {missing}")
    gpus = plan.model_copy(update={"ranks": (RankSpec(device="cuda"),) * 2})
    bundle = write_bundle(gpus, pipe.denoiser, tmp_path / "bundle", backend="tensorrt-rtx", arch="sm_89")
    assert bundle == Bundle.open(tmp_path / "bundle")
    target = bundle.manifest.target
    assert (target.device, target.arch, set(target.versions)) == ("cuda", "sm_89", {"torch", "tensorrt-rtx"})
    assert {artifact.file.rpartition(".")[2] for artifact in bundle.manifest.artifacts} == {"engine"}
    assert all(artifact.weights for artifact in bundle.manifest.artifacts), "the weights are inside"
    assert not bundle.manifest.shared
    if not torch.cuda.is_available():
        with pytest.raises(PlanMismatchError, match="this machine has none"):
            bundle.check_machine()


def test_cpu_ranks_have_no_engines(pipe, plan, tmp_path):
    with pytest.raises(UsageError, match="the plan is for ranks on 'cpu'"):
        write_bundle(plan, pipe.denoiser, tmp_path / "bundle", backend="tensorrt-rtx", arch="sm_89")
    assert not list(tmp_path.iterdir())
