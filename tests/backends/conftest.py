"""Stages to be compiled, and skips that say what is missing."""

from __future__ import annotations

import pytest
import torch
from bundle.small import PlainPipeline, small_plan

from hybridiff_compiler.backends.artifact import artifact_backend
from hybridiff_compiler.backends.stage_io import example_arguments
from hybridiff_compiler.bundle.writing import distinct_stages
from hybridiff_compiler.runtime.branch_calls import capture_branch


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small_stages():
    """The whole of a tiny denoiser, and a stage of it that reads values and returns some."""
    pipe = PlainPipeline()
    torch.nn.init.zeros_(pipe.denoiser.blocks[5].conv.weight)  # compilers like to do without weights of one value
    return [build.stage for build in distinct_stages(small_plan(pipe), pipe.denoiser)]


@pytest.fixture(scope="session")
def split(bench):
    """The two stages of a nested split of a bundled model: inner, outer."""
    captured = capture_branch(bench.denoiser, bench.signature)
    inner, outer = bench.partitions["nested"].stages
    return [
        captured.extract(mine, [value.name for value in captured.layers.crossing(mine, others)])
        for mine, others in ((inner, outer), (outer, inner))
    ]


@pytest.fixture(scope="session")
def need():
    """`need(backend)`: skip the test, with what un-skips it, where the backend is not installed."""

    def check(backend):
        missing = artifact_backend(backend).missing()
        if missing is not None:
            pytest.skip(f"{backend} {missing}")
        return artifact_backend(backend)

    return check


@pytest.fixture(scope="session")
def arguments():
    """`arguments(stage)`: random arguments of a stage, the same every time."""

    def make(stage, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(a.shape, generator=generator).to(a.dtype) if a.is_floating_point() else torch.full_like(a, 7)
            for a in example_arguments(stage)
        ]

    return make
