"""Two processes that torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridiff_compiler.ir import UsageError
from hybridiff_compiler.runtime.parallelize import parallelize

from .tiny import TinyPipeline, tiny_plan

SCRIPT = Path(__file__).with_name("torchrun_script.py")


def torchrun(how: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
        "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1",
        str(SCRIPT), how,
    ]
    paths = [str(SCRIPT.parents[1]), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_rank_zero_drives_and_the_others_serve() -> None:
    done = torchrun("works")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if "finished" in line] == ["rank 0 finished"]


def test_a_rank_that_fails_is_named() -> None:
    done = torchrun("fails")
    expected = "refused: rank 1 failed during step 0: ArithmeticError: tripped on purpose"
    assert expected in done.stdout, done.stderr[-3000:]


def test_another_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "1"), ("WORLD_SIZE", "3"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="2 ranks, torchrun started 3 processes"):
        parallelize(TinyPipeline(), tiny_plan(TinyPipeline()))
