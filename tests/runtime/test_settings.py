"""Settings that change numbers reach other processes, however they were made."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hybridiff_compiler.runtime.settings import NumericSettings

SCRIPT = """
import json, sys, torch
from hybridiff_compiler.runtime.settings import NumericSettings
exec(sys.argv[1])
settings = NumericSettings.current()
print(json.dumps(settings.to_json()))
if len(sys.argv) > 2:
    NumericSettings(**json.loads(sys.argv[2])).apply()
    print(json.dumps(NumericSettings.current().to_json()))
"""


def run(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("change", [
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'; torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
])
def test_torch_s_newer_interface(change: str) -> None:
    """After it was used torch does not answer for the older one."""
    (there,) = run(change)
    _, after = run("", there)
    assert '"cuda.matmul": "tf32"' in there
    assert '"mkldnn.matmul": "bf16"' in there
    assert after == there


def test_warnings_and_default_dtype_are_taken_over() -> None:
    before = NumericSettings.current()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        chosen = NumericSettings.current()
        before.apply()
        assert torch.get_default_dtype() == torch.float32
        assert not torch.are_deterministic_algorithms_enabled()
        chosen.apply()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert NumericSettings.current() == chosen
    finally:
        before.apply()
