"""Decoders with random weights in the shapes of well-known ones, small."""

from __future__ import annotations

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderTiny
from torch import Tensor, nn

from hybridiff_compiler import reference_models
from hybridiff_compiler.capture.bands import band_program
from hybridiff_compiler.capture.decoder import capture_decoder
from hybridiff_compiler.capture.rows import RowGraph, split_rows
from hybridiff_compiler.runtime.decode import BandRunner, run_side_by_side


def kl(channels: int = 4, widths: tuple[int, ...] = (16, 16, 32, 32), layers: int = 2) -> nn.Module:
    """SDXL's (4 channels) and SD3's (16) architecture with narrow layers."""
    blocks = len(widths)
    return AutoencoderKL(
        block_out_channels=widths, layers_per_block=layers, latent_channels=channels, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        use_quant_conv=channels == 4, use_post_quant_conv=channels == 4,
    ).eval()


def dc() -> nn.Module:
    """Sana's: linear attention, pixel shuffles, RMS norms."""
    return AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=8, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle", decoder_norm_types="rms_norm", decoder_act_fns="silu",
    ).eval()


def tiny() -> nn.Module:
    """TAESD's: no norms, no attention."""
    widths = (16, 16, 16, 16)
    return AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths).eval()


def video() -> nn.Module:
    """CogVideoX's: convolutions in three dimensions."""
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()


def bundled(name: str) -> nn.Module:
    """The VAE of a bundled pipeline."""
    vae: nn.Module = reference_models.load(name).vae
    return vae


def whole(vae: nn.Module, latents: Tensor) -> Tensor:
    """What the VAE itself decodes."""
    with torch.no_grad():
        image: Tensor = vae.decode(latents, return_dict=False)[0]
    return image


def row_graph(vae: nn.Module, latents: Tensor) -> RowGraph:
    """Captured and classified."""
    return split_rows(capture_decoder(vae, latents.shape, latents.dtype))


def in_bands(graph: RowGraph, latents: Tensor, ranks: int, **options) -> Tensor:
    """Decoded by so many ranks in one process; options are those of `band_program` and `BandRunner`."""
    channels_last = options.pop("channels_last", False)
    runners = [
        BandRunner(
            band_program(graph, rank, ranks, channels_last=channels_last), device=torch.device("cpu"), **options
        )
        for rank in range(ranks)
    ]
    for runner in runners:
        runner.prepare((latents.shape, latents.dtype))
    return run_side_by_side(runners, latents)
