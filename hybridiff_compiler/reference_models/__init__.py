"""The bundled reference models: small trained text-to-image models in the standard diffusers format.

`load(name)` is the public entry point. Nothing heavy is imported before it is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridiff_compiler.ir.errors import UsageError

from .prompts import HELD_OUT_PROMPTS, PROFILING_PROMPTS

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULTS", "HELD_OUT_PROMPTS", "NAMES", "PROFILING_PROMPTS", "UnknownReferenceModel", "load", "path"]

NAMES = ("unet", "mmdit")

DEFAULTS: dict[str, dict[str, Any]] = {
    "unet": {"num_inference_steps": 50, "guidance_scale": 5.0},
    # The pipeline reserves `max_sequence_length` tokens, 256 unless told otherwise, for a third text encoder that here
    # returns zeros. The model was trained with 1 to 256 of them; with 1 a forward pass is more than twice as fast.
    "mmdit": {"num_inference_steps": 50, "guidance_scale": 5.0, "max_sequence_length": 1},
}
"""Arguments of the pipeline call that the models were judged with."""


class UnknownReferenceModel(UsageError):
    """The name is not one of `NAMES`."""


def path(name: str) -> Path:
    """The diffusers folder of the bundled model `name`."""
    if name not in NAMES:
        raise UnknownReferenceModel(f"unknown bundled model {name!r}; allowed: {', '.join(NAMES)}")
    return Path(__file__).parent / name


def load(name: str, torch_dtype: torch.dtype | None = None) -> Any:
    """The stock diffusers pipeline of a bundled model, from local files only, in float32 unless told otherwise."""
    folder = path(name)
    import torch
    from diffusers import DiffusionPipeline

    # float32 is what the folders load in by themselves
    other = {} if torch_dtype in (None, torch.float32) else {"torch_dtype": torch_dtype}
    with _silent_loading():
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False, **other)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _silent_loading() -> Iterator[None]:
    """No progress bars for what takes a tenth of a second."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()
