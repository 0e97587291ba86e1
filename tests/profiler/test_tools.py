"""The tools around cost profiles: taking turns at a GPU, and checking estimates."""

import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridiff_compiler.profiler.devices import DEVICES
from hybridiff_compiler.profiler.roofline import Efficiency

from .test_roofline import loaded_graph, measured

TOOLS = Path(__file__).parents[2] / "tools"


def state(pid):
    """`T` for a stopped process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_whoever_times_stops_the_others(tmp_path):
    turns = runpy.run_path(str(TOOLS / "gpu_profiles.py"))["Turns"](tmp_path)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        (tmp_path / str(other.pid)).touch()
        (tmp_path / "999999999").touch()  # one that has ended is passed over
        with turns.alone():
            wait_for(lambda: state(other.pid) == "T")
        wait_for(lambda: state(other.pid) != "T")
    finally:
        other.kill()
        other.wait()


def test_estimates_are_checked_between_devices():
    tool = runpy.run_path(str(TOOLS / "check_roofline.py"))
    graph, how = loaded_graph(), Efficiency(1.7, 1.2, 3e-6, "made up")
    here = measured(graph, DEVICES["h100"], how)
    there = measured(graph, DEVICES["h200"], how, name="NVIDIA H200")
    row = tool["transfer"](here, there)
    assert row["to"] == "NVIDIA H200"
    for key in ("batch 1, by layer", "batch 2, by layer", "batch 1, fit only"):
        assert abs(row[key]["whole"]) < 0.01
        assert row[key]["layers"] < 0.02
    rows = tool["paper"]("sdxl", here)
    assert [row["row"] for row in rows][:3] == ["one GPU", "branch", "paper k=5"]
    assert rows[2]["predicted_s"] < rows[1]["predicted_s"] < rows[0]["predicted_s"]
