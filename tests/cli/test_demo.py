"""The demo as a program of its own: what it prints and writes, and that nothing is left when it is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from hybridiff_compiler.ir import Plan
from hybridiff_compiler.report import Results

ROWS = [
    "single", "branch", "paper", "planned-as-paper", "planned-30", "fewer-steps-30", "alternating-reuse-30",
    "planned-35", "fewer-steps-35", "alternating-reuse-35", "planned-40",
]


def start(files, out, mark):
    command = [sys.executable, "-c", "from hybridiff_compiler.cli import main; main()", "demo", "--models", "unet",
               "--profiles", str(files / "profiles"), "--prompts", "2", "--out", str(out), "--json"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"HYBRIDIFF_TEST_MARK": mark, "OMP_NUM_THREADS": "1"},
    )


def marked_processes(mark):
    """Ids of all processes that inherited the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_demo(files, tmp_path):
    process = start(files, tmp_path / "out", uuid.uuid4().hex)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    payload = json.loads(stdout)
    assert list(payload) == ["schema", "device", "models"]
    results = Results.parse(payload, source="stdout")
    rows = results.models["unet"].rows
    assert [row.name for row in rows] == ROWS
    for row in rows:
        assert row.latency_s > 0
        assert sum(row.patterns.values()) == row.steps
        exact = row.name in ("single", "branch")
        assert (row.psnr_db is None) == (row.psnr_db_min is None) == exact
        assert row.max_abs_diff is not None
    assert results.models["unet"].row("branch").max_abs_diff < 1e-3
    out = tmp_path / "out"
    assert json.loads((out / "demo.json").read_text()) == payload
    plans = {f"plan-{name}.json" for name in ROWS[1:]}
    assert {file.name for file in (out / "unet").iterdir()} == {"images.png", *plans}
    assert Plan.load(out / "unet" / "plan-fewer-steps-30.json").is_exact
    assert "planned-35" in stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_no_process(files, tmp_path, number, code):
    mark = uuid.uuid4().hex
    process = start(files, tmp_path / "out", mark)
    for line in process.stderr:
        if "branch ..." in line:
            break
    assert len(marked_processes(mark)) == 2, "the demo and one worker"
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    deadline = time.monotonic() + 10
    while marked_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked_processes(mark) == []
    assert not (tmp_path / "out" / "demo.json").exists()
