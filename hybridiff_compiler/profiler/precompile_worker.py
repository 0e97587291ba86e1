"""A helper process that builds stage graphs ahead: `python -m hybridiff_compiler.profiler.precompile_worker`.

Started by `precompile.Helpers` and nobody else; it lives as long as its standard input.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from ..runtime.segments import SegmentRunner
from .costs import distinct_segments
from .precompile import Job

__all__ = ["main"]


def main() -> None:
    """A recipe on the first line of standard input, then one job a line; answers each with a line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    first = sys.stdin.readline()
    if not first:
        return
    recipe = json.loads(first)
    module, _, function = recipe["function"].partition(":")
    denoiser = getattr(importlib.import_module(module), function)(**recipe["arguments"])
    captured: dict[int, Any] = {}
    for line in sys.stdin:
        job = Job.model_validate_json(line)
        runner = SegmentRunner(
            denoiser, job.signature, job.patterns, job.partitions, backend=job.backend, captured=captured or None
        )
        segment = list(distinct_segments(job.patterns).values())[job.segment]
        captured |= {batch: runner.captured(batch) for batch in {1, len(segment.branches)}}
        runner.seconds(segment, repeats=1)
        answers.write("built\n")


if __name__ == "__main__":
    main()
