"""MODEL on the command line: a bundled model, a local diffusers folder, or a hub id."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir import InputError, UsageError

if TYPE_CHECKING:
    from ..ir import Plan

__all__ = ["MODEL_HELP", "LoadedModel", "load_for_plan", "load_model", "weights_dtype"]

MODEL_HELP = "bundled:unet, bundled:mmdit, a local diffusers folder, or a hub id such as owner/name."

_BUNDLED = "bundled:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A pipeline and how it is called unless the user says otherwise."""

    name: str
    pipe: Any
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    options: Mapping[str, Any]
    """Further keyword arguments of the pipeline call."""
    profiling_prompts: tuple[str, ...] = ()
    held_out_prompts: tuple[str, ...] = ()


def load_model(model: str, *, device: str = "cpu", dtype: str | None = None) -> LoadedModel:
    """Load the pipeline that `model` names onto `device`.

    Args:
        model: see `MODEL_HELP`.
        device: `cpu` or `cuda`.
        dtype: torch dtype name; default float32 on a CPU and float16 on a GPU.

    Raises:
        UsageError: the text names no kind of model.
        InputError: the folder or hub id cannot be loaded, or the device is not there.
    """
    _quiet_libraries()
    if model.startswith(_BUNDLED):
        return _load_bundled(model, device, dtype)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise InputError(
                f"{model}: the folder holds no model_index.json, so it is no diffusers pipeline; save one there with "
                "pipe.save_pretrained(folder)"
            )
        pipe = _from_pretrained(model, device, dtype, local=True)
    elif folder.exists():
        raise InputError(f"{model}: is a file; MODEL is {MODEL_HELP}")
    elif model.startswith((".", "/", "~")):
        raise InputError(f"{model}: no such folder; MODEL is {MODEL_HELP}")
    elif _HUB_ID.fullmatch(model):
        pipe = _from_pretrained(model, device, dtype, local=False)
    else:
        raise UsageError(f"unknown model {model!r}; MODEL is {MODEL_HELP}")
    return LoadedModel(name=model, pipe=pipe, options={})


def load_for_plan(model: str, plan: Plan) -> LoadedModel:
    """Load `model` as `plan` needs it: on rank 0's device, in the plan's dtype."""
    return load_model(model, device=plan.ranks[0].device, dtype=plan.model.dtype)


def _load_bundled(model: str, device: str, dtype: str | None) -> LoadedModel:
    from .. import reference_models

    name = model.removeprefix(_BUNDLED)
    folder = reference_models.path(name)
    if not any(folder.rglob("*.safetensors")):
        raise InputError(f"{model}: the weights are not installed in {folder}; install the package again")
    pipe = reference_models.load(name, torch_dtype=weights_dtype(device, dtype))
    options = dict(reference_models.DEFAULTS[name])
    return LoadedModel(
        name=model, pipe=_on_device(pipe, device), num_inference_steps=options.pop("num_inference_steps"),
        guidance_scale=options.pop("guidance_scale"), options=options,
        profiling_prompts=2 * reference_models.PROFILING_PROMPTS,  # each from two seeds
        held_out_prompts=reference_models.HELD_OUT_PROMPTS,
    )


def _from_pretrained(model: str, device: str, dtype: str | None, *, local: bool) -> Any:
    from diffusers import DiffusionPipeline

    wanted = weights_dtype(device, dtype)
    try:
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=wanted, local_files_only=local)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        detail = " ".join(str(error).split())[:300]
        hint = (
            "check that the folder was saved completely with pipe.save_pretrained" if local
            else "give a local folder, or make sure that the id exists and the hub can be reached"
        )
        raise InputError(f"{model}: cannot be loaded as a diffusers pipeline ({detail}); {hint}") from None
    pipe.set_progress_bar_config(disable=True)
    return _on_device(pipe, device)


def weights_dtype(device: str, dtype: str | None) -> Any:
    """The torch dtype called `dtype`; default: what a device of this kind computes in.

    Raises:
        UsageError: it is not one of floating-point numbers.
        InputError: torch knows no such dtype.
    """
    import torch

    from ..capture.call import dtype_from_name

    if dtype is None:
        return torch.float32 if device == "cpu" else torch.float16
    found = dtype_from_name(dtype)
    if not found.is_floating_point:
        raise UsageError(f"got dtype {dtype!r}; a model has floating-point weights: float32, float16 or bfloat16")
    return found


def _on_device(pipe: Any, device: str) -> Any:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("this machine has no CUDA device; plan for CPU ranks, or run on a machine with one")
    return pipe.to(device) if device != "cpu" else pipe


def _quiet_libraries() -> None:
    """Advice of the libraries for their own callers is not for the users of this command line."""
    warnings.filterwarnings("ignore", module=r"(diffusers|transformers|torch|huggingface_hub)(\.|$)")
    for name in ("diffusers", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
