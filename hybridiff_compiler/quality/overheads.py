"""What a stock pipeline adds to every step of an architecture with random weights."""

from __future__ import annotations

from torch import nn

from ..profiler.generate import FirstCall
from ..runtime.intercept import find_denoiser, intercept
from .architectures import ARCHITECTURES, random_model

__all__ = ["watched_pipeline"]

_STEPS = 30
"""Few enough for everything they launch to fit into the queue of a GPU."""


def watched_pipeline(name: str, denoiser: nn.Module, *, pixels: int = 1024) -> FirstCall | None:
    """Run the stock pipeline of `name` around a denoiser, which is not called; None for an architecture without one.

    Args:
        name: of the architecture.
        denoiser: of that architecture, on the device that will run it.
        pixels: width and height.
    """
    if name not in ARCHITECTURES:
        return None
    parameter = next(denoiser.parameters())
    model = random_model(name, device="meta", dtype=parameter.dtype)
    model.pipe.register_modules(**{find_denoiser(model.pipe)[0]: denoiser})
    first = FirstCall()
    first.scheduler = type(model.pipe.scheduler).__name__
    with intercept(model.pipe, first):
        model.pipe(num_inference_steps=_STEPS, **model.options(pixels, 0))
    return first
