"""The planner's benchmark runs and says what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "bench_planner.py"


def test_one_size_reports_every_part() -> None:
    command = [sys.executable, str(TOOL), "--layers", "16", "--ranks", "2", "--steps", "5", "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["errors"] == "synthetic"
    (case,) = found["cases"]
    assert (case["layers"], case["ranks"], case["steps"]) == (16, 2, 5)
    assert set(case["seconds"]) == {"partitions", "divide", "patterns", "step costs", "frontier"}
    assert case["total_s"] == sum(case["seconds"].values())
    assert all(mib > 0 for mib in case["peak_mib"].values())
    assert case["counts"]["points"] > 0
