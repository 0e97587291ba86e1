"""Running the user's pipeline under a handler, with seeds that belong to prompts."""

from __future__ import annotations

import hashlib
import inspect
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..ir import BRANCHES, Branch, CallSignature, Costs, InputError
from ..runtime.intercept import GuidedCall, StepHandler, intercept

__all__ = ["FirstCall", "Generation", "noise_levels", "prompts_digest", "require_finite"]


_PAUSE_CYCLES = 1 << 29
"""A quarter of a second."""


def prompts_digest(prompts: Sequence[str]) -> str:
    """sha256 of the prompts in order."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def noise_levels(scheduler: Any, num_steps: int) -> tuple[float, ...]:
    """Timestep of each of the last `num_steps` steps over the number of training timesteps.

    Args:
        scheduler: after `set_timesteps`.
        num_steps: steps that a generation runs (fewer than the scheduler has for image-to-image).

    Returns:
        One number per step, near 1 for pure noise; empty for a scheduler without `num_train_timesteps`.
    """
    trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    if not trained:
        return ()
    return tuple(float(f"{float(t) / trained:.6g}") for t in scheduler.timesteps[-num_steps:])


def require_finite(values: Tensor, what: str) -> Tensor:
    """`values` themselves: errors of what is not a number cannot be told.

    Raises:
        InputError: some are NaN or infinite.
    """
    if not torch.isfinite(values).all():
        raise InputError(
            f"{what} of an exact generation are not finite (NaN or infinity), so no error can be measured; load the "
            "model in a dtype that does not overflow (bfloat16, float32), or with weights that are not damaged"
        )
    return values


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How images are generated for a profile: everything but the prompts."""

    pipe: Any
    num_inference_steps: int
    guidance_scale: float
    seed: int = 0
    """Prompt k starts from seed + k."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the pipeline call."""

    def at(self, guidance_scale: float) -> Generation:
        """The same generations at another guidance scale."""
        return replace(self, guidance_scale=guidance_scale)

    def call(self, prompts: Sequence[str], output_type: str, first: int = 0) -> Tensor:
        """What one call of the pipeline, as it is now, returns for `prompts`.

        Args:
            prompts: generated together.
            output_type: of the pipeline call: `latent` or `pt`.
            first: index of the first prompt.
        """
        generators = [torch.Generator("cpu").manual_seed(self.seed + first + k) for k in range(len(prompts))]
        arguments = {**self._guidance(len(prompts)), **self.options}
        # The first field of a pipeline's output is what it makes: images, frames, ...
        try:
            made: Tensor = self.pipe(
                prompt=list(prompts), num_inference_steps=self.num_inference_steps, generator=generators,
                output_type=output_type, **arguments,
            )[0]
        except (TypeError, ValueError) as error:
            if not _refused_at_once(error):
                raise
            raise InputError(f"{type(self.pipe).__name__} refuses this call: {error}") from None
        return made

    def latents(self, prompts: Sequence[str], handler: StepHandler, first: int = 0) -> Tensor:
        """Final latents of `prompts`, generated together; `first` is the index of the first prompt."""
        with intercept(self.pipe, handler):
            return self.call(prompts, "latent", first)

    def _guidance(self, count: int) -> dict[str, Any]:
        """How the pipeline is told the guidance scale: for distilled models `guidance_scale` is something else."""
        if "true_cfg_scale" in inspect.signature(type(self.pipe).__call__).parameters:
            return {"true_cfg_scale": self.guidance_scale, "negative_prompt": [""] * count}
        return {"guidance_scale": self.guidance_scale}


class FirstCall:
    """A `StepHandler` that computes one step, answers the others at once, and so times the pipeline around them.

    On CUDA that is the device time of the pipeline's own operations when the host is ahead of the device, as it is
    while a large denoiser runs: they queue up behind a pause of the device.
    """

    def __init__(self) -> None:
        self.signature: CallSignature | None = None
        self.call: GuidedCall | None = None
        self.num_steps = 0
        self._pair: dict[Branch, Tensor] = {}
        self._times: list[float] = []
        self._events: list[Any] = []
        self.scheduler = ""
        """Class name of the pipeline's, where whoever made the call noted it."""

    def start(self, num_steps: int, signature: CallSignature) -> bool:
        """See `StepHandler.start`."""
        self.signature, self.num_steps = signature, num_steps
        return True

    def step(self, call: GuidedCall) -> Mapping[Branch, Tensor]:
        """See `StepHandler.step`: the latents stand in for both estimates."""
        if self.call is None:
            self.call = call
            self._pair = {branch: next(iter(call.inputs[branch].values())).clone() for branch in BRANCHES}
        device = self._pair["cond"].device
        if device.type == "cuda":
            with torch.cuda.device(device):
                if not self._events:
                    torch.cuda.synchronize(device)
                    torch.cuda._sleep(_PAUSE_CYCLES)
                self._events.append(torch.cuda.Event(enable_timing=True))
                self._events[-1].record()
        self._times.append(time.perf_counter())
        return self._pair

    def step_overhead(self, denoiser_s: float = 0.0) -> float:
        """Seconds that the pipeline itself adds to a step (median).

        Args:
            denoiser_s: time of the denoiser in a step. On CUDA, what the host does meanwhile adds nothing.
        """
        host = _median_gap(self._times)
        if not self._events:
            return host
        torch.cuda.synchronize(self._pair["cond"].device)
        device = _median_gap([self._events[0].elapsed_time(event) / 1e3 for event in self._events])
        return max(min(device, host), host - denoiser_s)

    def added_to(self, costs: Costs) -> Costs:
        """`costs` with what the pipeline adds to a step of one branch."""
        return costs.model_copy(update={"step_overhead_s": self.step_overhead(sum(costs.layers[1]))})

    def require(self) -> tuple[CallSignature, GuidedCall]:
        """What was seen.

        Raises:
            InputError: the pipeline made no guided call.
        """
        if self.signature is None or self.call is None:
            raise InputError(
                "the pipeline made no classifier-free-guidance call; pass a guidance_scale above 1 to a pipeline that "
                "calls its denoiser with both branches, at once or one after the other"
            )
        return self.signature, self.call


def _refused_at_once(error: Exception) -> bool:
    """Whether the pipeline found its arguments wrong before it did anything: in its own check, or as unknown ones."""
    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return frames[-1] == "check_inputs" or (isinstance(error, TypeError) and len(frames) <= 2)


def _median_gap(times: Sequence[float]) -> float:
    gaps = sorted(after - before for before, after in pairwise(times))
    return gaps[len(gaps) // 2] if gaps else 0.0
