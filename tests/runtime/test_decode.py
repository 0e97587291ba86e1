"""Band programs as executables, and over a transport."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from capture.decoders import bundled, in_bands, kl, row_graph, whole
from torch import nn

from hybridiff_compiler.backends.cuda_graph import record_plainly
from hybridiff_compiler.capture.bands import band_program
from hybridiff_compiler.runtime.decode import BandRunner, join_bands, run_side_by_side
from hybridiff_compiler.runtime.transport import Channel, Transport


@pytest.mark.parametrize("name", ["unet", "mmdit"])
def test_bundled_decoders_in_bands(name: str) -> None:
    torch.manual_seed(0)
    vae = bundled(name)
    latents = torch.randn(1, vae.config.latent_channels, 13, 9)
    graph, reference = row_graph(vae, latents), whole(vae, latents)
    assert torch.equal(in_bands(graph, latents, 1), reference)
    for ranks in (2, 4):
        torch.testing.assert_close(in_bands(graph, latents, ranks), reference, rtol=1e-4, atol=2e-5)


def test_recorded_phases_work_on_each_others_memory() -> None:
    torch.manual_seed(0)
    vae = kl(4, (8, 16), 1)
    first, second = torch.randn(2, 1, 4, 6, 6)
    graph = row_graph(vae, first)
    for ranks in (1, 2):
        runners = [
            BandRunner(band_program(graph, rank, ranks), device=torch.device("cpu"), recorder=record_plainly)
            for rank in range(ranks)
        ]
        for runner in runners:
            runner.prepare((first.shape, first.dtype))
        for latents in (first, second, first):
            torch.testing.assert_close(run_side_by_side(runners, latents), whole(vae, latents), rtol=1e-4, atol=3e-5)


class _OneNorm(nn.Module):
    """The smallest decoder with a halo and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3, padding=1)

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (self.two(nn.functional.silu(self.norm(self.one(latents)))),)


@pytest.mark.slow
def test_compiled_phases() -> None:
    torch.manual_seed(0)
    vae, latents = _OneNorm(), torch.randn(1, 4, 6, 6)
    image = in_bands(row_graph(vae, latents), latents, 2, backend="inductor")
    torch.testing.assert_close(image, whole(vae, latents), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3])
def test_bands_over_gloo(ranks: int) -> None:
    """Ranks as threads of this process, on the transport that processes use."""
    torch.manual_seed(0)
    vae, latents = kl(4, (8, 16), 1), torch.randn(1, 4, 7, 6)
    graph = row_graph(vae, latents)
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    runners = [BandRunner(band_program(graph, rank, ranks), device=torch.device("cpu")) for rank in range(ranks)]
    bands: dict[int, torch.Tensor] = {}
    sent: dict[int, int] = {}

    def work(rank: int) -> None:
        runners[rank].prepare((latents.shape, latents.dtype))
        transport = Transport(store, rank, ranks, timeout_s=30)
        for _ in range(2):
            bands[rank] = runners[rank].run(latents, transport)
        sent[rank] = transport.sent_messages[Channel.BANDS]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    image = join_bands([bands[rank] for rank in range(ranks)], [runner.program for runner in runners])
    assert torch.equal(image, in_bands(graph, latents, ranks))
    assert sent[0] == 2 * sum(len(phase.sends) for phase in runners[0].program.phases)
