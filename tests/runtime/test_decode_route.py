"""Decodes of unmodified pipelines while a plan is open: all ranks or rank 0 alone, and everything as before after."""

from __future__ import annotations

import os
import signal
import warnings
from dataclasses import replace

import pytest
import torch
from capture.decoders import kl

from hybridiff_compiler.ir import InputError, UsageError, WorkerError
from hybridiff_compiler.runtime.decode_route import choose_decoding, faster
from hybridiff_compiler.runtime.parallelize import parallelize
from hybridiff_compiler.runtime.transport import Channel

from .tiny import ONE_RANK, TinyPipeline, tiny_plan


@pytest.fixture
def pipe() -> TinyPipeline:
    """A tiny pipeline with a VAE for its latents."""
    made = TinyPipeline()
    made.vae = kl(4, (8, 16), 1)
    return made


def decoded(parallel) -> int:
    """Messages of decodes that rank 0 has sent."""
    return parallel.transport.sent_messages[Channel.BANDS]


def test_images_of_bundled_pipelines(bench) -> None:
    plain = bench.image(steps=2)
    upcasts = bench.name == "unet"  # the other pipeline decodes in whatever dtype its VAE has
    if upcasts:
        bench.pipe.vae.to(torch.float16).register_to_config(force_upcast=True)
    try:
        with parallelize(bench.pipe, bench.plan("branch*2"), threads=1, decode="rows") as parallel:
            image = bench.image(steps=2)
            sent = decoded(parallel)
            assert sent > 0
            torch.testing.assert_close(image, plain, rtol=1e-3, atol=5e-3 if upcasts else 1e-4)
            assert torch.equal(bench.image(steps=2), image)
            with parallel.bypassed():
                bench.image(steps=2)
            assert decoded(parallel) == 2 * sent
        assert "decode" not in bench.pipe.vae.__dict__
        assert bench.pipe.vae.dtype == (torch.float16 if upcasts else torch.float32)
    finally:
        if upcasts:
            bench.pipe.vae.to(torch.float32).register_to_config(force_upcast=False)


@torch.no_grad()
def test_three_ranks_batches_and_what_is_not_covered(pipe: TinyPipeline) -> None:
    vae, latents = pipe.vae, torch.cat([pipe(0), pipe(1)])
    plain = vae.decode(latents).sample
    with parallelize(pipe, tiny_plan(pipe, ranks=3), threads=1, decode="rows") as parallel:
        torch.testing.assert_close(vae.decode(latents).sample, plain, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(vae.decode(pipe(1), return_dict=False)[0], plain[1:], rtol=1e-3, atol=1e-3)
        sent = decoded(parallel)
        assert sent > 0
        with pytest.warns(UserWarning, match=r"its latents are \[1, 4, 4, 4\].*exactly"):
            vae.decode(latents[:1, :, :4, :4])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            vae.decode(latents[:1, :, :4, :4])
        vae.enable_tiling()
        with pytest.warns(UserWarning, match="tiling is switched on"):
            vae.decode(latents)
        vae.disable_tiling()
        with pytest.warns(UserWarning, match=r"torch.float64"):
            vae.double().decode(latents.double())
        vae.float()
        with torch.enable_grad(), pytest.warns(UserWarning, match="gradients"):
            vae.decode(latents.clone().requires_grad_())
        assert decoded(parallel) == sent
        vae.decoder.conv_in.bias.add_(0.0)
        with pytest.warns(UserWarning, match="weights changed"):
            vae.decode(latents)
    assert "decode" not in vae.__dict__


@torch.no_grad()
def test_rank_0_alone(pipe: TinyPipeline) -> None:
    latents = pipe(0)
    plain = pipe.vae.decode(latents).sample
    plan = tiny_plan(pipe, "single", ranks=1, tables=ONE_RANK, exact="single")
    with parallelize(pipe, plan, threads=1, decode="driver"):
        assert "decode" in pipe.vae.__dict__
        assert torch.equal(pipe.vae.decode(latents).sample, plain)
    with parallelize(pipe, plan, threads=1, decode="auto") as parallel:  # leaves CPUs to the pipeline
        assert "decode" not in pipe.vae.__dict__
        assert parallel.decode_seconds == {}


@torch.no_grad()
def test_auto_measures_both(pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_gpus(pipe, plan, mode, device):
        return replace(choose_decoding(pipe, plan, "rows", device), mode=mode)

    monkeypatch.setattr("hybridiff_compiler.runtime.parallelize.choose_decoding", as_on_gpus)
    latents = pipe(0)
    plain = pipe.vae.decode(latents).sample
    with parallelize(pipe, tiny_plan(pipe), threads=1, decode="auto") as parallel:
        assert set(parallel.decode_seconds) == {"driver", "rows"}
        before = decoded(parallel)
        torch.testing.assert_close(pipe.vae.decode(latents).sample, plain, rtol=1e-3, atol=1e-4)
        by_rows = parallel.decode_seconds["rows"] < parallel.decode_seconds["driver"]
        assert (decoded(parallel) > before) == by_rows
        pipe(0)


@torch.no_grad()
def test_a_worker_that_dies_before_the_decode(pipe: TinyPipeline) -> None:
    with parallelize(pipe, tiny_plan(pipe), threads=1, decode="rows") as parallel:
        latents = pipe(0)
        os.kill(parallel.worker_pids[0], signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"rank 1 was killed by SIGKILL.*during the decoding of an image"):
            pipe.vae.decode(latents)
        assert not parallel.is_open
    assert "decode" not in pipe.vae.__dict__
    pipe.vae.decode(pipe(0))


def test_pipelines_without_a_decoder_are_refused() -> None:
    pipe = TinyPipeline()
    with pytest.raises(InputError, match="no VAE that decodes; use decode='pipeline'"):
        parallelize(pipe, tiny_plan(pipe), decode="rows")
    with pytest.raises(UsageError, match="choose from auto, pipeline, driver, rows"):
        parallelize(pipe, tiny_plan(pipe), decode="columns")


def test_the_faster_way_is_taken() -> None:
    def slow(latents: torch.Tensor) -> torch.Tensor:
        torch.randn(400, 400) @ torch.randn(400, 400)
        return sum(torch.randn(300, 300) @ torch.randn(300, 300) for _ in range(20))

    name, seconds = faster({"slow": slow, "fast": lambda latents: latents}, torch.zeros(1))
    assert name == "fast"
    assert seconds["fast"] < seconds["slow"]
