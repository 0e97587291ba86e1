"""Whole driver processes: a script without a main guard, one that is killed, one that gets Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from .test_failures import wait_until_gone

SCRIPT = """
import sys, time
import torch
torch.set_num_threads(1)
from runtime.tiny import TinyPipeline, tiny_plan
from hybridiff_compiler.runtime.parallelize import parallelize
pipe = TinyPipeline()
parallel = parallelize(pipe, tiny_plan(pipe, "branch paper"), threads=1)
print(*parallel.worker_pids, flush=True)
print(float(pipe(1).sum()), flush=True)
if sys.argv[1] == "loop":
    while True:
        pipe(1)
if sys.argv[1] == "fork":
    import os
    image, child = pipe(1), os.fork()
    if not child:
        try:
            pipe(1)
        except Exception as error:
            parallel.close()
            print("child:", type(error).__name__, pipe(1).shape == image.shape, flush=True)
        sys.exit(0)
    print("child ended with", os.waitpid(child, 0)[1], flush=True)
    print("parent:", torch.equal(pipe(1), image))
if sys.argv[1] == "deleted":
    import os, shutil
    image = pipe(1)
    parallel.close()
    shutil.rmtree(os.getcwd())
    sys.path.insert(0, "")
    with parallelize(pipe, tiny_plan(pipe, "branch paper"), threads=1):
        print(torch.equal(pipe(1), image))
"""


def start(tmp_path: Path, mode: str, folder: Path | None = None) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, str(script), mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": path}, cwd=folder or tmp_path,
    )


def first_lines(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert pids, process.stderr and process.stderr.read()
    assert float(process.stdout.readline())
    return pids


def test_script_without_main_guard_ends_by_itself(tmp_path: Path) -> None:
    process = start(tmp_path, "end")
    pids = first_lines(process)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    wait_until_gone(pids)


def test_a_forked_child_leaves_the_workers_alone(tmp_path: Path) -> None:
    """Its exit must neither hang nor end what belongs to its parent."""
    process = start(tmp_path, "fork")
    pids = first_lines(process)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert output.splitlines() == ["child: UsageError True", "child ended with 0", "parent: True"], errors
    wait_until_gone(pids)


def test_modules_in_the_working_directory_and_no_working_directory(tmp_path: Path) -> None:
    """Workers find what the driver finds: the folder it was started in is not among that."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "queue.py").write_text("raise SystemExit('executed from the working directory')")
    process = start(tmp_path, "deleted", folder)
    pids = first_lines(process)
    output, errors = process.communicate(timeout=60)
    assert output.splitlines() == ["True"], errors
    wait_until_gone(pids)


def test_killed_driver_leaves_no_worker(tmp_path: Path) -> None:
    process = start(tmp_path, "loop")
    pids = first_lines(process)
    process.kill()
    process.communicate(timeout=30)
    wait_until_gone(pids)


def test_ctrl_c_ends_the_workers(tmp_path: Path) -> None:
    process = start(tmp_path, "loop")
    pids = first_lines(process)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()  # a failure must not leave it looping; does nothing when it has ended
    assert "KeyboardInterrupt" in errors
    assert "WorkerError" not in errors
    wait_until_gone(pids)
