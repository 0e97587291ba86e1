"""Capture of a VAE's decoder: latents in, image out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.errors import InputError
from .export import ExportedCall, export_call, module_device

__all__ = ["Decode", "capture_decoder", "decode_parameters", "decoder_only"]


class Decode(nn.Module):
    """`vae.decode` as a forward of its own."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """The image of `latents`, as the VAE returns it."""
        vae: Any = self.vae
        image: Tensor = vae.decode(latents, return_dict=False)[0]
        return image


def capture_decoder(vae: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> ExportedCall:
    """The graph of `vae.decode` for latents of one shape; its parameters are those of the VAE, by reference.

    Raises:
        InputError: there is no such method, or it cannot be exported.
    """
    if not callable(getattr(vae, "decode", None)):
        raise InputError(f"{type(vae).__name__} has no method decode")
    latents = torch.empty(tuple(shape), dtype=dtype, device=module_device(vae))
    return export_call(Decode(vae).eval(), (), {"latents": latents})


def decode_parameters(exported: ExportedCall) -> tuple[str, ...]:
    """Qualified names, within the VAE, of the tensors that its decoder reads."""
    names = (str(node.target) for node in exported.module.graph.nodes if node.op == "get_attr")
    return tuple(dict.fromkeys(name.removeprefix("vae.") for name in names if name not in exported.constants))


def decoder_only(vae: nn.Module, names: Iterable[str]) -> nn.Module:
    """A shallow copy of `vae` without the children that hold none of the tensors `names`, such as the encoder."""
    used = {name.partition(".")[0] for name in names}
    pruned = copy.copy(vae)
    pruned.__dict__["_modules"] = {key: child for key, child in vae._modules.items() if key in used}
    return pruned
