"""What each network is trained on: the loss of one fresh random batch."""

from collections.abc import Callable

import torch

from .attention import ends_in_repeated_token
from .data import Emoji, LatentBank
from .models import unet_time_ids

__all__ = ["mmdit_loss", "unet_loss", "vae_loss"]

CAPTION_DROPOUT = 0.1
_SNR_LIMIT = 5.0
_KL_WEIGHT = 5e-4


def vae_loss(emoji: Emoji, vae: torch.nn.Module, batch: int) -> Callable[[], torch.Tensor]:
    """L1 + 2 L2 reconstruction with a slight pull of the latents to a unit normal."""

    def loss() -> torch.Tensor:
        with torch.no_grad():
            pictures = emoji.views(emoji.draw(batch))
        posterior = vae.encode(pictures).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        sample = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        difference = vae.decode(sample).sample.float() - pictures
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return difference.abs().mean() + 2 * difference.square().mean() + _KL_WEIGHT * kl

    return loss


def unet_loss(
    emoji: Emoji, bank: LatentBank, modules: dict[str, torch.nn.Module], scheduler, batch: int
) -> Callable[[], torch.Tensor]:
    """Noise prediction over all timesteps, the easy late ones weighted down (min-SNR)."""
    device = emoji.images.device
    alphas = scheduler.alphas_cumprod.to(device)
    time_ids = unet_time_ids(device).repeat(batch, 1)

    def loss() -> torch.Tensor:
        index = emoji.draw(batch)
        latents = bank.draw(index)
        sequence, pooled = _encode(modules["text_encoder_2"], emoji.captions(index, CAPTION_DROPOUT))
        timesteps = torch.randint(len(alphas), (batch,), device=device)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        conditioning = {"text_embeds": pooled, "time_ids": time_ids}
        denoiser = modules["denoiser"]
        estimate = denoiser(noisy, timesteps, sequence, added_cond_kwargs=conditioning, return_dict=False)[0]
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=_SNR_LIMIT) / snr
        return (weight * (estimate.float() - noise).square()).mean() / _mean_weight(alphas)

    return loss


def mmdit_loss(
    emoji: Emoji, bank: LatentBank, modules: dict[str, torch.nn.Module], batch: int
) -> Callable[[], torch.Tensor]:
    """Rectified flow: the direction from picture to noise, times drawn from a logit-normal.

    The pipeline appends `max_sequence_length` zero tokens to the text. They are all alike, and stay alike through every
    block, so training appends one and gives it the attention weight of as many as the pipeline may send.
    """
    device = emoji.images.device
    repeats = ends_in_repeated_token(modules["denoiser"], batch, device)

    def loss() -> torch.Tensor:
        index = emoji.draw(batch)
        latents, tokens = bank.draw(index), emoji.captions(index, CAPTION_DROPOUT)
        first, first_pooled = _encode(modules["text_encoder"], tokens)
        second, second_pooled = _encode(modules["text_encoder_2"], tokens)
        sequence = torch.cat([first, second], dim=-1)
        sequence = torch.cat([sequence, torch.zeros_like(sequence[:, :1])], dim=1)
        repeats.copy_(_zero_tokens(batch, device))
        sigma = torch.randn(batch, device=device).sigmoid()
        noise = torch.randn_like(latents)
        share = sigma.view(-1, 1, 1, 1)
        noisy = (1 - share) * latents + share * noise
        estimate = modules["denoiser"](
            noisy, sequence, torch.cat([first_pooled, second_pooled], dim=-1), sigma * 1000, return_dict=False
        )[0]
        return (estimate.float() - (noise - latents)).square().mean()

    return loss


def _encode(encoder: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence and pooled vector as the pipelines read them."""
    output = encoder(tokens, output_hidden_states=True)
    return output.hidden_states[-2], output[0]


def _mean_weight(alphas: torch.Tensor) -> torch.Tensor:
    snr = alphas / (1 - alphas)
    return (snr.clamp(max=_SNR_LIMIT) / snr).mean()


def _zero_tokens(batch: int, device: torch.device) -> torch.Tensor:
    """How many zero tokens each sample sees: 1 (the recommended call), 256 (the default one), or between."""
    between = (torch.rand(batch, device=device) * 5.545).exp()  # up to 256
    kind = torch.rand(batch, device=device)
    return torch.where(kind < 0.5, 1.0, torch.where(kind < 0.8, 256.0, between))
