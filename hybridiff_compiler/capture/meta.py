"""Denoisers without weights: built from a config on the meta device, for capture and planning on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..ir.errors import InputError
from .call import dtype_from_name

__all__ = ["cast_checkpoint", "meta_denoiser"]


def meta_denoiser(
    denoiser_class: type[nn.Module], config: Mapping[str, Any], dtype: torch.dtype | str = torch.float16
) -> nn.Module:
    """Build a diffusers model from its config on the meta device, in eval mode; no weight is allocated.

    Dtypes are what `from_pretrained(..., torch_dtype=dtype)` gives: everything in the checkpoint in `dtype`, except the
    modules that the class itself keeps in float32.

    Args:
        denoiser_class: a diffusers model class, or any module class that takes the config as keyword arguments.
        config: the model's `config.json` (keys starting with `_` are ignored), or constructor arguments.
        dtype: the dtype to plan for; captured graphs have dtypes baked in. A name such as `"bfloat16"` will do.

    Raises:
        InputError: the class refuses the config, or `dtype` is not a floating-point dtype.
    """
    if isinstance(dtype, str):
        dtype = dtype_from_name(dtype)
    if not dtype.is_floating_point:
        raise InputError(f"a denoiser cannot be built in {dtype}; use a floating-point dtype such as torch.float16")
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    build = getattr(denoiser_class, "from_config", None)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            denoiser = build(arguments) if build is not None else denoiser_class(**arguments)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"{denoiser_class.__name__} cannot be built from this config: {error}; use the config.json of a "
            f"{denoiser_class.__name__}"
        ) from error
    finally:
        torch.set_default_dtype(previous)
    return cast_checkpoint(denoiser.to("meta"), dtype).eval()


def cast_checkpoint(denoiser: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast what a checkpoint holds (parameters and persistent buffers) as loading it would."""
    kept = getattr(denoiser, "_keep_in_fp32_modules", None) or []
    persistent = set(denoiser.state_dict(keep_vars=True))
    for prefix, module in denoiser.named_modules():
        for tensors in (module._parameters, module._buffers):
            for leaf, tensor in tensors.items():
                name = f"{prefix}.{leaf}" if prefix else leaf
                if tensor is None or name not in persistent or not tensor.is_floating_point():
                    continue
                target = torch.float32 if any(part in name.split(".") for part in kept) else dtype
                if tensor.dtype != target:
                    cast = tensor.detach().to(target)
                    tensors[leaf] = nn.Parameter(cast) if isinstance(tensor, nn.Parameter) else cast
    return denoiser
