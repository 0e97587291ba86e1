"""Classification: what of a decoder can be computed on a band of rows, found from its operations alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hybridiff_compiler.capture.decoder import capture_decoder, decode_parameters, decoder_only
from hybridiff_compiler.capture.meta import meta_denoiser
from hybridiff_compiler.capture.rows import Rows, split_rows
from hybridiff_compiler.ir import InputError

from .decoders import dc, kl, row_graph


class _Decoder(nn.Module):
    """A convolution, an operation, a convolution."""

    def __init__(self, between, strided: bool = False) -> None:
        super().__init__()
        self.before = nn.Conv2d(4, 8, 3, padding=1)
        self.after = nn.Conv2d(8, 3, 3, padding=1, stride=2 if strided else 1)
        self.between = between

    def decode(self, latents, return_dict=True):
        return (self.after(self.between(self.before(latents))),)


def test_everything_of_a_kl_decoder_is_split_attention_included() -> None:
    graph = row_graph(kl(), torch.zeros(1, 4, 6, 5))
    assert graph.whole == ()
    assert graph.share(1) == 1
    assert graph.share(2) == 0.5
    assert graph.share(4) == pytest.approx(2 / 6)
    (output,) = graph.exported.module.graph.output_node().all_input_nodes
    assert graph.splits[output].rows == Rows(2, 8)
    attention = next(n for n in graph.splits if n.target is torch.ops.aten.scaled_dot_product_attention.default)
    query, key, value = attention.args[:3]
    assert graph.splits[attention].reads == {query: Rows(2, 5), key: None, value: None}


def test_sdxl_at_full_size_needs_no_weights() -> None:
    from diffusers import AutoencoderKL

    config = {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = meta_denoiser(AutoencoderKL, config, torch.float16)
    graph = split_rows(capture_decoder(vae, (1, 4, 128, 128), torch.float16))
    assert graph.base == 128
    assert graph.share(8) == 1 / 8


def test_what_has_no_rule_is_computed_whole_and_said() -> None:
    graph = row_graph(dc(), torch.zeros(1, 4, 8, 8))
    assert len(graph.whole) == 1
    assert "matmul" in graph.whole[0]
    assert "up_blocks.1.0.attn mixes rows" in graph.whole[0]
    assert 0.5 < graph.share(2) < 0.6


@pytest.mark.parametrize(("between", "why"), [
    (lambda x: x.flip(2), "flip"), (lambda x: x.cumsum(2), "cumsum"), (lambda x: x.mean(2, keepdim=True) + x, "mean"),
    (lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear"), "bilinear"),
    (lambda x: nn.functional.pad(x, (0, 0, 1, 1)), "pad"),
])
def test_operations_across_rows(between, why: str) -> None:
    graph = row_graph(_Decoder(between), torch.zeros(1, 4, 6, 6))
    assert any(why in reason for reason in graph.whole)


def test_a_decoder_without_any_split_is_explained() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4 * 6 * 6, 12)

        def decode(self, latents, return_dict=True):
            return (self.linear(latents.flatten(1)),)

    with pytest.raises(InputError, match=r"no convolution or matrix product.*runs on the driver alone"):
        row_graph(Folded(), torch.zeros(1, 4, 6, 6))
    with pytest.raises(InputError, match="has no method decode"):
        capture_decoder(nn.Linear(2, 2), (1, 4, 8, 8), torch.float32)


def test_only_what_a_decode_reads_is_handed_over() -> None:
    vae = kl()
    names = decode_parameters(capture_decoder(vae, (1, 4, 4, 4), torch.float32))
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in names)
    part = decoder_only(vae, names)
    assert {name for name, _ in part.named_parameters()} == set(names)
    assert part.decoder is vae.decoder
    assert hasattr(vae, "encoder")
    assert not hasattr(part, "encoder")
