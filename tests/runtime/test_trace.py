"""Traces of all ranks in one file (recording one is in tests/gpu)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from hybridiff_compiler.ir import UsageError
from hybridiff_compiler.runtime.parallelize import ParallelPipeline
from hybridiff_compiler.runtime.trace import merge_traces


def test_merging_keeps_ranks_apart_and_the_time_axis(tmp_path: Path) -> None:
    files = []
    for rank in range(2):
        files.append(tmp_path / f"{rank}.json")
        events = [{"ph": "X", "name": "gemm", "ts": 10.0 * rank, "dur": 4.0, "pid": 0, "tid": 7}, {"ph": "M", "pid": 0}]
        files[-1].write_text(json.dumps({"traceEvents": events}))
    target = merge_traces(files, tmp_path / "all.json.gz")
    events = json.loads(gzip.decompress(target.read_bytes()))["traceEvents"]
    assert [(event["pid"], event["ts"]) for event in events] == [("rank 0, 0", 0.0), ("rank 1, 0", 10.0)]


def test_only_gpus_are_traced(two_ranks: ParallelPipeline, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recorded on GPUs"), two_ranks.traced(tmp_path / "trace.json.gz"):
        pass
    assert list(tmp_path.iterdir()) == []
