"""The decode benchmark on two processes, and what becomes of a rank that fails."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from capture.decoders import kl

from hybridiff_compiler.ir import UsageError, WorkerError
from hybridiff_compiler.quality.architectures import VAES, random_vae
from hybridiff_compiler.quality.bench_decode import bench_decode, decode_results
from hybridiff_compiler.runtime.decode_ranks import DecodeCall
from hybridiff_compiler.runtime.decode_worker import DecodeRanks


def test_rows_and_document(tmp_path) -> None:
    torch.manual_seed(0)
    rows = tuple(bench_decode(
        kl(4, (8, 16), 1), torch.randn(1, 4, 8, 8), gpus=2, backend="eager", repeats=1
    ))
    assert [row.name for row in rows] == ["eager", "compiled", "rows-2"]
    assert rows[1].max_abs_diff == 0
    assert rows[2].max_abs_diff < 1e-4
    assert rows[2].share == 0.5
    assert rows[2].sent_bytes > 0
    assert rows[0].pixels == 16
    results = decode_results({"kl": rows}, device="cpu", seed=0, random_weights=True)
    assert '"rows-2"' in results.save(tmp_path / "decode.json").read_text()


def test_a_killed_rank_is_one_clear_error() -> None:
    vae = kl(4, (8, 16), 1)
    with DecodeRanks(vae, DecodeCall((1, 4, 8, 8), "float32"), ranks=2, backend="eager", timeout_s=20) as ranks:
        ranks.decode(torch.randn(1, 4, 8, 8))
        os.kill(ranks._pool.pids[0], signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"rank 1 was killed by SIGKILL.*during the decoding of an image"):
            ranks.decode(torch.randn(1, 4, 8, 8))


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(UsageError, match="there are sdxl, sd3"):
        random_vae("sd9", device="cpu")
    assert set(VAES) == {"sdxl", "sd3"}
