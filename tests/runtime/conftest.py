"""One thread per rank, so that the simulator and every rank split no reduction differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from hybridiff_compiler.ir import Plan
from hybridiff_compiler.runtime.intercept import intercept
from hybridiff_compiler.runtime.parallelize import ParallelPipeline, parallelize
from hybridiff_compiler.runtime.segments import SegmentRunner
from hybridiff_compiler.runtime.simulator import Simulator

from .tiny import FOUR_RANKS, TinyPipeline, tiny_plan


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pipe2() -> TinyPipeline:
    """The pipeline that `two_ranks` runs."""
    return TinyPipeline()


@pytest.fixture(scope="session")
def two_ranks(pipe2: TinyPipeline) -> Iterator[ParallelPipeline]:
    """Two ranks that know all the two-rank tables; tests choose schedules with `use` and leave it usable."""
    with parallelize(pipe2, tiny_plan(pipe2), threads=1) as parallel:
        yield parallel


@pytest.fixture(scope="session")
def pipe4() -> TinyPipeline:
    """The pipeline that `four_ranks` runs."""
    return TinyPipeline()


@pytest.fixture(scope="session")
def four_ranks(pipe4: TinyPipeline) -> Iterator[ParallelPipeline]:
    """Four ranks that know all the four-rank tables."""
    with parallelize(pipe4, tiny_plan(pipe4, ranks=4, tables=FOUR_RANKS), threads=1) as parallel:
        yield parallel


@pytest.fixture(scope="session")
def simulate() -> Callable[..., torch.Tensor]:
    """`simulate(plan, prompt, **kwargs)`: what the simulator makes of a generation of a `TinyPipeline`."""
    pipe = TinyPipeline()
    runners: dict[tuple, dict[int, SegmentRunner]] = {}

    def run(plan: Plan, prompt: int = 0, **kwargs) -> torch.Tensor:
        known = runners.setdefault((plan.patterns, plan.partitions), {})
        with intercept(pipe, Simulator(plan, pipe.denoiser, runners=known)):
            return pipe(prompt, **kwargs)

    return run
