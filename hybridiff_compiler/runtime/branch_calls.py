"""Calls of one branch: their signatures at other batch sizes, examples of them, and the denoiser captured at one."""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import nn

from ..capture import CapturedDenoiser, capture, unflatten_call
from ..ir import CallSignature

__all__ = ["batch_factor", "capture_branch", "example_call", "scale_signature"]


def scale_signature(signature: CallSignature, batch: int, factor: int) -> CallSignature:
    """The signature with dimension 0 of every leaf of leading size `batch` multiplied by `factor`."""
    leaves = tuple(
        leaf.model_copy(update={"shape": (batch * factor, *leaf.shape[1:])}) if leaf.shape and leaf.shape[0] == batch
        else leaf
        for leaf in signature.leaves
    )
    return CallSignature(leaves=leaves)


def batch_factor(expected: CallSignature, got: CallSignature) -> int | None:
    """Images per branch in `got` if it is `expected` (one image) at another batch size, else None."""
    sizes = {g.shape[0] for e, g in zip(expected.leaves, got.leaves) if e.shape and g.shape and e.shape[0] == 1}
    for factor in sorted(sizes):
        if scale_signature(expected, 1, factor) == got:
            return factor
    return None


def example_call(signature: CallSignature, device: torch.device | str) -> dict[str, Any]:
    """Keyword arguments of zeros that match `signature`, for capturing."""
    return unflatten_call({
        leaf.path: ast.literal_eval(leaf.constant or "None") if leaf.shape is None
        else torch.zeros(leaf.shape, dtype=getattr(torch, leaf.dtype or "float32"), device=device)
        for leaf in signature.leaves
    })


def capture_branch(denoiser: nn.Module, signature: CallSignature) -> CapturedDenoiser:
    """Capture `denoiser` at `signature` on the device of its parameters."""
    device = next(denoiser.parameters()).device
    return capture(denoiser, (), example_call(signature, device))
