"""Random views of the emoji, made on the device: scale, shift, rotation, mirror, hue, saturation.

Without them a model of this size learns the pictures by heart, its trajectories snap to training images, and every
cheap schedule looks perfect.
"""

import functools

import torch
import torch.nn.functional as F

__all__ = ["augment"]


def augment(images: torch.Tensor, mirrorable: torch.Tensor) -> torch.Tensor:
    """`images` (n, 3, 64, 64) in [-1, 1] on white; the result has the same shape and range."""
    return _recolour(_move(images, mirrorable)).clamp(-1, 1)


def _uniform(count: int, low: float, high: float, device: torch.device) -> torch.Tensor:
    return torch.empty(count, device=device).uniform_(low, high)


def _move(images: torch.Tensor, mirrorable: torch.Tensor) -> torch.Tensor:
    count, device = len(images), images.device
    angle = (torch.randn(count, device=device) * 0.14).clamp(-0.3, 0.3)
    zoom = 1 / _uniform(count, 0.76, 1.0, device)
    aspect = _uniform(count, 0.95, 1.05, device)
    mirror = torch.where(mirrorable & (torch.rand(count, device=device) < 0.5), -1.0, 1.0)
    room = (1 - 1 / zoom) + 0.05  # shift further where the picture has been made smaller
    shift_x, shift_y = (_uniform(count, -1.0, 1.0, device) * room * zoom for _ in range(2))
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    first = torch.stack([cos * aspect * mirror, -sin * mirror, shift_x * mirror], dim=1)
    second = torch.stack([sin / aspect, cos / aspect, shift_y], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), list(images.shape), align_corners=False)
    # White is 1; padding with zeros around (image - 1) keeps the surroundings white.
    return F.grid_sample(images - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1


def _recolour(images: torch.Tensor) -> torch.Tensor:
    """Turn and stretch the chroma plane of YIQ: grey, and so the white background, stays as it is."""
    count, device = len(images), images.device
    to_yiq, from_yiq = _yiq(device)
    hue = (torch.randn(count, device=device) * 0.18).clamp(-0.4, 0.4)
    saturation = _uniform(count, 0.8, 1.15, device)
    cos, sin = hue.cos() * saturation, hue.sin() * saturation
    zero, one = torch.zeros_like(hue), torch.ones_like(hue)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(count, 3, 3)
    matrix = from_yiq @ turn @ to_yiq
    return torch.einsum("nij,njhw->nihw", matrix, images)


@functools.cache
def _yiq(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """RGB to YIQ and back; kept, since a CUDA graph can neither copy from the host nor invert."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    return to_yiq.to(device), torch.linalg.inv(to_yiq).to(device)
