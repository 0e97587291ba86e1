"""Every rank reports its memory."""

from __future__ import annotations

import torch

from hybridiff_compiler.runtime.memory import peak_bytes
from hybridiff_compiler.runtime.parallelize import ParallelPipeline

from .tiny import TinyPipeline


def test_every_rank_reports(pipe2: TinyPipeline, two_ranks: ParallelPipeline) -> None:
    before = pipe2(1)
    first, second = two_ranks.peak_bytes(), two_ranks.peak_bytes()
    assert len(first) == 2
    assert all(50 << 20 < peak < 1 << 40 for peak in first), "a Python process with torch in it"
    assert all(a <= b for a, b in zip(first, second))
    assert second[0] <= peak_bytes(torch.device("cpu"))
    assert torch.equal(pipe2(1), before)
