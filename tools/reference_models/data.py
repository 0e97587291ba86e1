"""The prepared data on the device: batches of pictures for the autoencoder, a bank of latents for the denoisers."""

from pathlib import Path

import numpy as np
import torch

from .augment import augment

__all__ = ["Emoji", "LatentBank"]


class Emoji:
    """Pictures, caption tokens and sampling weights as tensors."""

    def __init__(self, data: Path, device: torch.device) -> None:
        with np.load(data / "data.npz") as arrays:
            images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
            self.images = (images.to(device).float() / 127.5 - 1).contiguous()
            self.tokens = torch.from_numpy(arrays["tokens"].astype(np.int64)).to(device)
            self.empty_tokens = torch.from_numpy(arrays["empty_tokens"].astype(np.int64)).to(device)
            self.mirrorable = torch.from_numpy(arrays["mirrorable"]).to(device)
            weights = torch.from_numpy(arrays["weights"]).double()
        self._cumulative = (weights.cumsum(0) / weights.sum()).float().to(device)
        self.vocabulary_size = int(self.tokens.max()) + 1  # the end token is the largest id

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, count: int) -> torch.Tensor:
        """Indices of `count` emoji, by weight."""
        uniform = torch.rand(count, device=self.images.device)
        return torch.searchsorted(self._cumulative, uniform).clamp(max=len(self) - 1)

    def views(self, index: torch.Tensor) -> torch.Tensor:
        """A fresh augmented picture for each index."""
        return augment(self.images[index], self.mirrorable[index])

    def captions(self, index: torch.Tensor, dropout: float) -> torch.Tensor:
        """A random caption for each index, the empty one with probability `dropout`."""
        count, device = len(index), self.images.device
        which = torch.randint(self.tokens.shape[1], (count,), device=device)
        dropped = torch.rand(count, 1, device=device) < dropout
        return torch.where(dropped, self.empty_tokens, self.tokens[index, which])


class LatentBank:
    """Latents of many augmented views of every emoji, steadily replaced by fresh ones."""

    def __init__(self, emoji: Emoji, vae: torch.nn.Module, views: int, refill: int = 1024) -> None:
        self._emoji, self._vae, self._views, self._refill = emoji, vae, views, refill
        device = emoji.images.device
        self._owner = torch.arange(len(emoji), device=device).repeat(views)  # rows are view-major
        self._latents = torch.empty(len(self._owner), 4, 16, 16, device=device)
        self._next = 0
        for _ in range(-(-len(self._owner) // refill)):
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Encode fresh views into the oldest rows."""
        rows = slice(self._next, min(self._next + self._refill, len(self._owner)))
        self._next = 0 if rows.stop == len(self._owner) else rows.stop
        views = self._emoji.views(self._owner[rows])
        with torch.autocast(views.device.type, torch.bfloat16):
            self._latents[rows] = self._vae.encode(views).latent_dist.mean.float()

    def draw(self, index: torch.Tensor) -> torch.Tensor:
        """One random view's latents for each emoji index."""
        view = torch.randint(self._views, index.shape, device=index.device)
        return self._latents[view * len(self._emoji) + index]
