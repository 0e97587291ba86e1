"""What a step must not do: read tensors back, make groups, or allocate more and more."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from hybridiff_compiler.runtime.parallelize import ParallelPipeline

from .tiny import TinyPipeline

READ_BACK = ("aten._local_scalar_dense", "aten.equal", "aten.nonzero")
NEW_MEMORY = ("aten.empty", "aten.zeros", "aten.clone", "aten.cat")


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[".".join(str(func).split(".")[:2])] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["branch", "paper", "pipe", "reuse"])
def test_a_step_reads_nothing_back_and_allocates_only_the_estimate(
    name: str, pipe2: TinyPipeline, two_ranks: ParallelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_ranks.use(two_ranks.plan.with_steps(("branch", *[name] * 7)))
    pipe2(1)
    driver, transport = two_ranks._driver, two_ranks.transport
    assert transport is not None
    buffers = len(transport._buffers)
    run, step, steps = driver._executor.runner.run, driver.step, []
    have_changed, looks = driver._weights.have_changed, []

    def graph_only(*args: Any, **options: Any) -> Any:
        with torch._C._DisableTorchDispatch():  # the graph's own operations do not count
            return run(*args, **options)

    def look() -> bool:
        with torch._C._DisableTorchDispatch():  # once per generation, on streams beside the step's
            looks.append(have_changed())
        return looks[-1]

    def counted(call: Any) -> Any:
        with _Count() as count:
            pair = step(call)
        steps.append(count.calls)
        return pair

    monkeypatch.setattr(driver._executor.runner, "run", graph_only)
    monkeypatch.setattr(driver._weights, "have_changed", look)
    monkeypatch.setattr(driver, "step", counted)
    for prompt in range(4):
        pipe2(prompt)
    assert len(steps) == 32
    assert looks == [False] * 4
    for calls in steps:
        assert not any(calls[operation] for operation in READ_BACK), calls
        assert sum(calls[operation] for operation in NEW_MEMORY) <= 1, calls
    assert len(transport._buffers) == buffers
    assert not dist.is_initialized()
