"""Decodes on GPUs: one graph, and bands on two of them."""

from __future__ import annotations

import pytest
import torch
from capture.decoders import kl, whole

from hybridiff_compiler.runtime.decode_ranks import DecodeCall, DecodeRank
from hybridiff_compiler.runtime.decode_worker import DecodeRanks
from hybridiff_compiler.runtime.parallelize import parallelize


@pytest.mark.one_gpu
def test_one_graph() -> None:
    torch.manual_seed(0)
    vae = kl().to("cuda")
    rank = DecodeRank(
        vae, DecodeCall((1, 4, 16, 12), "float32"), rank=0, ranks=1, device=torch.device("cuda", 0), backend="eager"
    )
    rank.prepare()
    for latents in torch.randn(3, 1, 4, 16, 12, device="cuda"):
        torch.testing.assert_close(rank.decode(latents, None), whole(vae, latents), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bands_on_two_gpus(dtype: str) -> None:
    torch.manual_seed(0)
    vae = kl().to("cuda", getattr(torch, dtype))
    with DecodeRanks(vae, DecodeCall((1, 4, 17, 12), dtype), ranks=2, backend="eager") as ranks:
        for latents in torch.randn(3, 1, 4, 17, 12, device="cuda").to(vae.dtype):
            torch.testing.assert_close(ranks.decode(latents), whole(vae, latents), rtol=2e-2, atol=2e-2)


def test_images_of_a_plan(model) -> None:  # type: ignore[no-untyped-def]
    latents = model("a red apple")
    vae = model.pipe.vae
    with torch.no_grad():
        plain = vae.decode(latents, return_dict=False)[0]
        for mode in ("rows", "driver", "auto"):
            with parallelize(model.pipe, model.plan, backend="eager", decode=mode) as parallel:
                assert torch.equal(model("a red apple"), model("a red apple"))
                torch.testing.assert_close(vae.decode(latents, return_dict=False)[0], plain, rtol=2e-2, atol=2e-2)
                assert set(parallel.decode_seconds) == ({"rows", "driver"} if mode == "auto" else set())
    assert "decode" not in vae.__dict__
