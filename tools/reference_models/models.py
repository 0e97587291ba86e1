"""The architectures, in one place: autoencoder, text encoder, U-Net, MMDiT."""

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from .tokenizer import MAX_TOKENS

__all__ = [
    "IMAGE_SIZE",
    "LATENT_CHANNELS",
    "LATENT_SIZE",
    "build_mmdit",
    "build_text_encoder",
    "build_unet",
    "build_vae",
    "fold_normalisation",
    "parameter_count",
    "unet_time_ids",
]

IMAGE_SIZE = 64
LATENT_SIZE = 16
LATENT_CHANNELS = 4
TEXT_WIDTH = 128
_TIME_ID_WIDTH = 32


def build_vae() -> AutoencoderKL:
    """64x64 pixels to 16x16 latents and back."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,  # the normalisation is folded into the quant convolutions instead
        shift_factor=0.0,
        force_upcast=False,
    )


def build_text_encoder(vocabulary_size: int) -> CLIPTextModelWithProjection:
    """Three CLIP layers: the pipelines read the sequence after the second and the pooled vector after the third."""
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=vocabulary_size - 2,
        eos_token_id=vocabulary_size - 1,  # where the pooled vector is read
        pad_token_id=vocabulary_size - 1,
    )
    return CLIPTextModelWithProjection(config)


def build_unet() -> UNet2DConditionModel:
    """SDXL's plan in small: a plain outer level, two inner levels with cross attention, size and crop conditioning."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(96, 96, 128),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(3, 3, 4),  # number of heads, 32 channels each
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * _TIME_ID_WIDTH + TEXT_WIDTH,
    )


def build_mmdit(zero_output: bool = False) -> SD3Transformer2DModel:
    """Eight joint blocks of width 160 over 8x8 patches; the text sequences of two encoders side by side.

    With `zero_output` every block starts as the identity and the model as zero, which training starts from.
    """
    model = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=8,
        num_attention_heads=5,
        attention_head_dim=32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    starts = (model.proj_out, model.norm_out.linear, *(block.norm1.linear for block in model.transformer_blocks))
    for linear in starts if zero_output else ():
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return model


def unet_time_ids(device: torch.device | str) -> torch.Tensor:
    """What the SDXL pipeline sends for a default call: original size, crop corner, target size."""
    size = float(IMAGE_SIZE)
    return torch.tensor([[size, size, 0.0, 0.0, size, size]], device=device)


@torch.no_grad()
def fold_normalisation(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Make the latents zero-mean, unit-variance per channel inside the convolutions next to them."""
    channels = vae.config.latent_channels
    mean, std = mean.to(vae.quant_conv.bias), std.to(vae.quant_conv.bias)
    vae.quant_conv.weight[:channels] /= std.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
    vae.quant_conv.bias[channels:] -= 2 * std.log()
    vae.post_quant_conv.bias += torch.einsum("oikl,i->o", vae.post_quant_conv.weight, mean)
    vae.post_quant_conv.weight *= std.view(1, -1, 1, 1)


def parameter_count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
