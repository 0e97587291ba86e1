"""Graphs compiled by other processes, and found in the cache by the rank that needs them."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from torch._dynamo.utils import counters

from hybridiff_compiler.ir import InputError
from hybridiff_compiler.runtime.ahead import Builders
from hybridiff_compiler.runtime.building import RankBuild
from hybridiff_compiler.runtime.executor import RankExecutors, capture_for

from .tiny import ONE_RANK, TinyPipeline, tiny_plan


def executors(backend: str = "inductor"):  # type: ignore[no-untyped-def]
    pipe = TinyPipeline()
    plan = tiny_plan(pipe, "single", ranks=1, tables=ONE_RANK, exact="single")
    made = RankExecutors(plan, pipe.denoiser, capture_for(plan, pipe.denoiser), rank=0, transport=None, backend=backend)
    return plan, pipe.denoiser, made


@pytest.mark.slow
def test_other_processes_fill_the_cache(tmp_path: Path) -> None:
    """In a process of its own: settings that earlier tests have touched would be part of the cache's keys here."""
    process = multiprocessing.get_context("spawn").Process(target=fill_and_find, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


def fill_and_find(folder: Path) -> None:
    """Others build all graphs; this process finds them in an empty cache that they have filled."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ.pop("TRITON_CACHE_DIR", None)
    plan, denoiser, made = executors()

    def build() -> RankBuild:
        return RankBuild(plan, denoiser, made, (1, 2), rank=0, backend="inductor", neighbours=1, jobs=1)

    first, told = build(), []
    assert (first.missing, first.helpers) == (2, 1)
    Builders.claim = lambda self, number: self.settle()  # leave everything to the others
    counters.clear()
    first.run(lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]
    found = counters["inductor"]
    assert found["fxgraph_cache_hit"] >= 2, dict(found)
    assert not found["fxgraph_cache_miss"], dict(found)
    again = build()
    assert (again.missing, again.helpers) == (0, 0)


def test_backends_that_cache_nothing_need_no_other_processes() -> None:
    plan, denoiser, made = executors("eager")
    build = RankBuild(plan, denoiser, made, (1, 2), rank=0, backend="eager", neighbours=1, jobs=2)
    assert (build.missing, build.helpers) == (0, 0)
    build.run()


def test_jobs_that_nobody_has_begun_are_taken_back() -> None:
    with Builders("hybridiff_compiler.runtime.builder", [], 0) as builders:
        builders.start(["a", "b"])
        builders.claim(0)
        builders.settle()


def test_processes_that_end_are_named_or_forgiven() -> None:
    with Builders("hybridiff_compiler.runtime.builder", [b"no json", b""], 1) as builders:
        builders.start([1, 2])
        builders.settle()
        with pytest.raises(InputError, match=r"(?s)exited with code 1; its last output:.*JSONDecodeError"):
            builders.wait()


def test_without_processes_nothing_is_waited_for() -> None:
    with Builders("hybridiff_compiler.runtime.builder", [], 0) as builders:
        builders.start([1])
        builders.settle()
