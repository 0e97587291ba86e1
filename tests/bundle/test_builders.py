"""Graphs compiled in several processes."""

from __future__ import annotations

import pytest
import torch

from hybridiff_compiler.backends.artifact import artifact_backend
from hybridiff_compiler.bundle import write_bundle
from hybridiff_compiler.bundle.builders import BuildOrder, build_in_processes, default_jobs
from hybridiff_compiler.ir import InputError

from .test_running import TOLERANCE, simulate


@pytest.mark.slow
def test_two_processes_build_what_one_builds(compiled, pipe, plan, tmp_path):
    alone, seen = compiled("aotinductor"), []
    bundle = write_bundle(
        plan, pipe.denoiser, tmp_path / "bundle", backend="aotinductor", jobs=2,
        on_progress=lambda stage, done, total: seen.append((done, total)),
    )
    assert seen[0] == (0, 2)
    assert seen[-1] == (2, 2)
    for one, other in zip(alone.manifest.artifacts, bundle.manifest.artifacts, strict=True):
        assert (one.file, one.graph, one.inputs, one.outputs) == (other.file, other.graph, other.inputs, other.outputs)
    difference = simulate(pipe, plan, bundle.backend) - simulate(pipe, plan)
    assert difference.abs().max() <= TOLERANCE, "builders have other weights, the bundle has none"


def test_a_failing_builder_says_why(pipe, plan, tmp_path):
    backend = artifact_backend("aotinductor")
    target = backend.target("cpu", "float32", None)
    with pytest.raises(InputError, match="has no graph 000000000000"):
        build_in_processes(
            plan, pipe.denoiser, "aotinductor", target, tmp_path, [BuildOrder("0" * 64, "stage")], jobs=1
        )
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"fingerprint": "0" * 64})})
    with pytest.raises(InputError, match=r"(?s)exited with code 1.*the plan was made for"):
        build_in_processes(
            other, pipe.denoiser, "aotinductor", target, tmp_path, [BuildOrder("0" * 64, "stage")], jobs=1
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("graphs", "cores", "free_gib", "jobs"), [
    (5, 16, 64, 5), (5, 4, 64, 2), (5, 16, 7, 2), (5, 16, 0, 1), (1, 16, 64, 1), (5, 1, 64, 1),
])
def test_default_jobs(graphs, cores, free_gib, jobs):
    assert default_jobs(graphs, torch.nn.Linear(8, 8), cores, free_gib << 30) == jobs
