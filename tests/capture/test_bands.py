"""Band programs: what the ranks compute together is the whole decode."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.capture.bands import band_bounds, band_program
from hybridiff_compiler.ir import UsageError

from .decoders import dc, in_bands, kl, row_graph, tiny, video, whole


@pytest.mark.parametrize(("make", "shape", "ranks"), [
    (kl, (1, 4, 7, 5), 1), (kl, (1, 4, 7, 5), 2), (kl, (1, 4, 7, 5), 3),
    (partial(kl, 16, (8, 16), 1), (1, 16, 9, 8), 2), (partial(kl, 16, (8, 16), 1), (1, 16, 9, 8), 4),
    (dc, (1, 4, 8, 6), 3), (tiny, (1, 4, 5, 6), 4), (video, (1, 4, 2, 5, 4), 2),
])
def test_bands_are_the_whole(make, shape: tuple[int, ...], ranks: int) -> None:
    torch.manual_seed(0)
    vae, latents = make(), torch.randn(shape)
    reference = whole(vae, latents)
    image = in_bands(row_graph(vae, latents), latents, ranks)
    assert image.shape == reference.shape
    torch.testing.assert_close(image, reference, rtol=1e-4, atol=3e-5)


@settings(max_examples=4, deadline=None)
@given(height=st.integers(3, 11), width=st.integers(1, 7), ranks=st.integers(1, 3), images=st.integers(1, 2))
def test_any_size(height: int, width: int, ranks: int, images: int) -> None:
    torch.manual_seed(0)
    vae, latents = kl(4, (8, 16), 1), torch.randn(images, 4, height, width)
    torch.testing.assert_close(
        in_bands(row_graph(vae, latents), latents, ranks), whole(vae, latents), rtol=1e-4, atol=3e-5)


def test_channels_last_changes_nothing_but_memory() -> None:
    torch.manual_seed(0)
    vae, latents = kl(4, (8, 16), 1), torch.randn(1, 4, 6, 6)
    graph = row_graph(vae, latents)
    torch.testing.assert_close(
        in_bands(graph, latents, 2, channels_last=True), whole(vae, latents), rtol=1e-4, atol=3e-5)
    alone = band_program(graph, 0, 1, channels_last=True)
    assert len(alone.phases) == 1
    names = {str(n.target) for n in alone.phases[0].module.graph.nodes if n.op == "call_function"}
    assert not any("group_norm" in name for name in names)
    torch.testing.assert_close(
        in_bands(graph, latents, 1, channels_last=True), whole(vae, latents), rtol=1e-4, atol=3e-5)
    program = band_program(graph, 0, 2, channels_last=True)
    clones = [
        n for p in program.phases for n in p.module.graph.nodes
        if n.target is torch.ops.aten.clone.default and n.kwargs["memory_format"] is torch.channels_last
    ]
    halos = [s for p in program.phases for parcel in p.receives for s, _ in parcel.specs if len(s) == 4 and s[2] == 1]
    assert len(clones) == 1 + len(halos)


def test_lower_precision_normalises_in_float32() -> None:
    torch.manual_seed(0)
    vae, latents = kl(4, (8, 16), 1).to(torch.bfloat16), torch.randn(1, 4, 6, 6, dtype=torch.bfloat16)
    reference = whole(vae.float(), latents.float())
    vae = vae.to(torch.bfloat16)
    plain = (whole(vae, latents).float() - reference).abs().mean()
    bands = (in_bands(row_graph(vae, latents), latents, 2).float() - reference).abs().mean()
    assert bands < 1.5 * plain


def test_both_ends_of_a_message_agree() -> None:
    graph = row_graph(kl(4, (8, 16), 1), torch.zeros(1, 4, 7, 5))
    programs = [band_program(graph, rank, 3) for rank in range(3)]
    assert len({len(program.phases) for program in programs}) == 1
    for index in range(len(programs[0].phases)):
        for program in programs:
            for sent in program.phases[index].sends:
                back = programs[sent.peer].phases[index].receives
                (arriving,) = [parcel for parcel in back if parcel.peer == program.rank]
                assert arriving.specs == sent.specs


def test_a_residual_block_takes_two_rounds() -> None:
    """Halo and moments travel together, in front of norm and activation."""
    shallow, deep = (
        len(band_program(row_graph(kl(4, (8, 16), layers), torch.zeros(1, 4, 6, 6)), 0, 2).phases) for layers in (1, 2)
    )
    assert deep - shallow == 2 * 2  # one more residual block in each of two up blocks


def test_nothing_is_computed_that_nobody_needs() -> None:
    graph = row_graph(kl(4, (8, 16), 1), torch.zeros(1, 4, 8, 8))
    program = band_program(graph, 0, 2)
    activations = [
        n for p in program.phases for n in p.module.graph.nodes if n.target is torch.ops.aten.silu.default]
    assert len(activations) == sum(n.target is torch.ops.aten.silu.default for n in graph.splits)


def test_bounds() -> None:
    assert band_bounds(8, 2) == ((0, 4), (4, 8))
    assert band_bounds(7, 3) == ((0, 2), (2, 4), (4, 7))
    with pytest.raises(UsageError, match="3 rows of latents cannot be cut into 4 bands"):
        band_bounds(3, 4)


def test_a_band_smaller_than_a_halo_is_refused() -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (torch.nn.Conv2d(2, 2, 7, padding=3) for _ in range(2))

        def decode(self, latents, return_dict=True):
            return (self.two(self.one(latents)),)

    vae, latents = Wide(), torch.randn(1, 2, 8, 4)
    graph = row_graph(vae, latents)
    torch.testing.assert_close(in_bands(graph, latents, 2), whole(vae, latents))
    with pytest.raises(UsageError, match="a band of 2 rows is smaller than the 3 rows"):
        band_program(graph, 0, 4)
