"""Bundles on GPUs: compiled there, replayed as CUDA graphs, on the live weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hybridiff_compiler import reference_models
from hybridiff_compiler.backends.stage_io import stage_digest
from hybridiff_compiler.bundle import Bundle, write_bundle
from hybridiff_compiler.ir import Plan
from hybridiff_compiler.runtime.branch_calls import capture_branch
from hybridiff_compiler.runtime.intercept import find_denoiser, intercept
from hybridiff_compiler.runtime.parallelize import parallelize
from hybridiff_compiler.runtime.segments import SegmentRunner
from hybridiff_compiler.runtime.simulator import Simulator

from .conftest import GpuModel

STEPS = ("branch", "branch-reuse", "reuse", "branch", "branch", "branch-reuse", "branch", "branch")


@pytest.fixture(scope="module")
def plan(model: GpuModel) -> Plan:
    """Two graphs: the whole denoiser, and the outer stage."""
    known = {pattern.name: pattern for pattern in model.plan.patterns}
    chosen = tuple(known[name] for name in dict.fromkeys(STEPS))
    return Plan(**(dict(model.plan.with_steps(STEPS)) | {"patterns": chosen}))


@pytest.fixture(scope="module")
def bundle(model: GpuModel, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(
        plan, model.denoiser, tmp_path_factory.mktemp("bundles") / "bundle", backend="aotinductor", jobs=2
    )


@pytest.mark.one_gpu
def test_the_graph_is_the_same_on_cpu_and_gpu(model: GpuModel) -> None:
    """So a plan or bundle made on one kind of machine is recognised on the other."""
    here = capture_branch(model.denoiser, model.plan.model.signature)
    loaded = find_denoiser(reference_models.load("unet", torch_dtype=torch.float16))[1]
    there = capture_branch(loaded, model.plan.model.signature)
    assert here.layers.fingerprint() == there.layers.fingerprint()
    assert stage_digest(here.whole()) == stage_digest(there.whole())


@pytest.mark.one_gpu
def test_replayed_packages_make_the_image_of_inductor(
    model: GpuModel, bundle: Bundle, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.simulate(bundle.plan, "a red apple", "inductor")
    monkeypatch.setattr(torch.export, "export", None)
    monkeypatch.setattr(torch, "compile", None)
    check(model.simulate(bundle.plan, "a red apple", bundle.backend), expected, "aotinductor")


@pytest.mark.one_gpu
def test_recorded_packages_read_the_live_weights(model: GpuModel, bundle: Bundle, check: Callable[..., None]) -> None:
    """An edit in place is seen by CUDA graphs that were recorded before it."""
    pipe = GpuModel._load()
    denoiser, runners = find_denoiser(pipe)[1], dict[int, SegmentRunner]()

    def generate(backend: str, known: dict[int, SegmentRunner] | None = None) -> torch.Tensor:
        with intercept(pipe, Simulator(bundle.plan, denoiser, backend=backend, runners=known)):
            return model("a red apple", pipe)

    before = generate(bundle.backend, runners)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(0.98)
    after = generate(bundle.backend, runners)
    assert (after - before).abs().max() > 0.02
    check(after, generate("eager"), "edited weights")


def test_two_ranks_run_a_bundle(model: GpuModel, bundle: Bundle, check: Callable[..., None]) -> None:
    """The worker's GPU is not the one that the package was compiled on."""
    with parallelize(model.pipe, bundle.folder, timeout_s=20.0) as parallel:
        got = model("a red apple")
        assert parallel.executed == STEPS
    check(got, model.simulate(bundle.plan, "a red apple", bundle.backend), "two ranks")
