"""`pipe.vae.decode` of an unmodified pipeline, routed to captured graphs on one rank or on all of them."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..capture.bands import band_program
from ..capture.decoder import capture_decoder, decode_parameters
from ..capture.rows import split_rows
from ..ir import InputError, Plan, UsageError
from .decode_ranks import DecodeCall, DecodeRank, decode_dtype, decoder_to_share
from .instance_hooks import InstanceHook
from .intercept import find_denoiser

__all__ = [
    "DECODE_BACKEND", "MODES", "DecodeMode", "Decoding", "choose_decoding", "decode_parts", "faster", "routed",
]

DecodeMode = Literal["auto", "pipeline", "driver", "rows"]
MODES: tuple[DecodeMode, ...] = ("auto", "pipeline", "driver", "rows")
"""Who decodes images: the pipeline as it comes; rank 0 by one captured graph; all ranks, a band of rows each; or, on
GPUs, whichever of the last two is faster when measured (on CPUs the pipeline, as compiling gains little there and ranks
share the processor)."""
DECODE_BACKEND = "eager"
"""Of decoders: an image is decoded once per generation, so graphs that are ready in seconds are worth more than fused
ones that take minutes to compile. On GPUs they are replayed as CUDA graphs."""
_TIMED = 3


@dataclass(frozen=True)
class Decoding:
    """What is known of a pipeline's decode before anything is built."""

    mode: DecodeMode
    """`driver`, `rows`, or `auto` to build both."""
    vae: nn.Module
    decoder: nn.Module
    """What of it decodes, in the dtype to decode in."""
    call: DecodeCall
    names: tuple[str, ...]
    """Tensors of the VAE that a decode reads."""
    shares_memory: bool
    """Whether `decoder` reads the VAE's own memory; else it has a copy in another dtype."""

    @property
    def on_all_ranks(self) -> bool:
        """Whether the workers get the decoder."""
        return self.mode != "driver"


def choose_decoding(pipe: Any, plan: Plan, mode: DecodeMode, device: torch.device) -> Decoding | None:
    """What to build for `mode`; None: the pipeline decodes as it comes.

    Raises:
        UsageError: no such mode.
        InputError: `driver` or `rows`, and this pipeline's decode cannot be captured, or not cut into bands.
    """
    if mode not in MODES:
        raise UsageError(f"got decode={mode!r}; choose from {', '.join(MODES)}")
    if mode == "pipeline" or (mode == "auto" and device.type == "cpu"):
        return None
    try:
        return _examine(pipe, plan, mode, device)
    except InputError:
        if mode == "auto":
            return None
        raise


def _examine(pipe: Any, plan: Plan, mode: DecodeMode, device: torch.device) -> Decoding:
    vae = getattr(pipe, "vae", None)
    if not isinstance(vae, nn.Module) or not callable(getattr(vae, "decode", None)):
        raise InputError(f"{type(pipe).__name__} has no VAE that decodes; use decode='pipeline'")
    where = next(vae.parameters()).device
    if where != next(find_denoiser(pipe)[1].parameters()).device:
        raise InputError(f"the VAE is on {where}, rank 0 of the plan on {device}; move it there, or use "
                         "decode='pipeline'")
    latents = next(leaf for leaf in plan.model.signature.leaves if leaf.shape is not None)
    shape, channels = latents.shape or (), getattr(vae.config, "latent_channels", None)
    if len(shape) < 4 or shape[1] != channels:
        raise InputError(
            f"the denoiser takes latents {list(shape)}, the VAE latents of {channels} channels: the shape that it will "
            "decode cannot be told from the plan; use decode='pipeline'"
        )
    dtype = decode_dtype(pipe)
    call = DecodeCall((1, *shape[1:]), str(dtype).removeprefix("torch."))
    exported = capture_decoder(vae, call.shape, next(vae.parameters()).dtype)
    names = decode_parameters(exported)
    chosen: DecodeMode = "driver" if plan.world_size == 1 else mode
    if chosen != "driver":
        try:
            band_program(split_rows(exported), 0, plan.world_size)
        except (InputError, UsageError):
            if mode == "rows":
                raise
            chosen = "driver"
    shares = next(vae.parameters()).dtype == dtype
    return Decoding(chosen, vae, decoder_to_share(vae, call.shape, dtype), call, names, shares)


def decode_parts(
    decoding: Decoding | None, ranks: int, device: torch.device, report: Callable[[str, int, int], None]
) -> dict[str, DecodeRank]:
    """Rank 0's part of every way to decode that may be used, ready to run; none where the pipeline decodes.

    Args:
        decoding: what is to be built.
        ranks: of the plan.
        device: rank 0's.
        report: called with (what, done, total).
    """
    parts: dict[str, DecodeRank] = {}
    if decoding is not None:
        worlds = {"driver": 1, "rows": ranks}
        for way in worlds if decoding.mode == "auto" else [decoding.mode]:
            parts[way] = part = DecodeRank(
                decoding.decoder, decoding.call, rank=0, ranks=worlds[way], device=device, backend=DECODE_BACKEND,
            )
            part.prepare(lambda done, total: report("building graphs of the decoder", done, total))
    return parts


def faster(ways: Mapping[str, Callable[[Tensor], Tensor]], latents: Tensor) -> tuple[str, dict[str, float]]:
    """The fastest of several ways to decode, and the seconds of each (best of three, after one to warm up)."""
    seconds = {}
    for name, decode in ways.items():
        times = []
        for _ in range(1 + _TIMED):
            begin = time.perf_counter()
            decode(latents).sum().item()  # waits for the device
            times.append(time.perf_counter() - begin)
        seconds[name] = min(times[1:])
    return min(seconds, key=seconds.__getitem__), seconds


@contextmanager
def routed(
    decoding: Decoding, decode: Callable[[Tensor], Tensor], is_off: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """While open, `vae.decode` goes to `decode`, image by image; what that does not cover runs as it comes.

    Args:
        decoding: of the VAE.
        decode: from latents of one image to the image.
        is_off: whether to leave everything to the VAE for now.
    """
    vae: Any = decoding.vae
    original = vae.decode
    signature = inspect.signature(original)
    known = _weights_key(decoding)
    said: set[str] = set()

    def uncovered(call: inspect.BoundArguments, latents: Tensor) -> str | None:
        """Why this call is not covered."""
        expected = decoding.call
        name = next(iter(signature.parameters))
        if extra := [key for key, value in call.arguments.items()
                     if key not in (name, "return_dict") and value is not signature.parameters[key].default]:
            return f"it passes {', '.join(extra)}"
        if tuple(latents.shape[1:]) != expected.shape[1:] or not latents.shape[0]:
            return f"its latents are {list(latents.shape)}, the plan's {list(expected.shape)}"
        if latents.dtype != expected.torch_dtype or latents.device != next(vae.parameters()).device:
            return f"its latents are {latents.dtype} on {latents.device}, the plan's {expected.torch_dtype}"
        if getattr(vae, "use_tiling", False):
            return "tiling is switched on"
        if latents.requires_grad and torch.is_grad_enabled():
            return "gradients are asked for"
        return None if _weights_key(decoding) == known else "the VAE's weights changed after parallelize"

    def routed_decode(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        latents = next(iter(call.arguments.values()), None)
        if is_off() or not isinstance(latents, Tensor):
            return original(*args, **kwargs)
        if (reason := uncovered(call, latents)) is not None:
            if reason not in said:
                said.add(reason)
                warnings.warn(
                    f"hybridiff: this decode is not what the plan was prepared for: {reason}; it runs on one device, "
                    "exactly", stacklevel=2,
                )
            return original(*args, **kwargs)
        with torch.no_grad():
            images = [decode(part.contiguous()) for part in latents.split(1)]
        image = images[0] if len(images) == 1 else torch.cat(images)
        if not call.arguments.get("return_dict", True):
            return (image,)
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=image)

    hook = InstanceHook.put(vae, "decode", routed_decode)
    try:
        yield
    finally:
        hook.remove()


def _weights_key(decoding: Decoding) -> tuple[object, ...]:
    """Changes when a tensor that the decoder reads is replaced or edited.

    Casting the VAE and back, as pipelines do that upcast it, moves its memory and keeps everything else.
    """
    key: list[object] = []
    for name in decoding.names:
        tensor: Any = decoding.vae
        for part in name.split("."):
            tensor = getattr(tensor, part, None)
        if tensor is None:
            return ()
        version = None if tensor.is_inference() else tensor._version
        key.append((id(tensor), version, tensor.data_ptr() if decoding.shares_memory else None))
    return tuple(key)
