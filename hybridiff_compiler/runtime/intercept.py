"""Watching an unmodified diffusers pipeline: which denoiser call is which step of which generation.

Nothing here knows a pipeline or model class. A generation starts when the scheduler's `set_timesteps` is called; its
step count is what the scheduler holds from the first timestep that reaches the denoiser on (so image-to-image
strengths work); batched classifier-free guidance is recognised from the first call: two equal halves of latents whose
conditioning differs. Every call that does not fit goes to the original forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..capture import flatten_call
from ..ir import BRANCHES, Branch, CallSignature, InputError

__all__ = ["GuidedCall", "StepHandler", "find_denoiser", "intercept", "is_intercepted"]

_HOOK = "hybridiff_compiler"


@dataclass(frozen=True)
class GuidedCall:
    """One denoising step as the pipeline asked for it."""

    step: int
    num_steps: int
    inputs: Mapping[Branch, Mapping[str, Tensor]]
    """Per branch: leaf path -> tensor of that branch alone (views of the pipeline's tensors)."""


class StepHandler(Protocol):
    """What runs the denoising steps in the pipeline's place."""

    def start(self, num_steps: int, signature: CallSignature) -> bool:
        """A generation begins; `signature` is one branch's call. False: run this generation without the handler."""

    def step(self, call: GuidedCall) -> Mapping[Branch, Tensor]:
        """The pair of estimates of one step."""


def find_denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """Attribute name and module of the pipeline's denoiser: the component whose forward takes a timestep.

    Raises:
        InputError: the pipeline has none, or several.
    """
    found = [
        (name, module)
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module) and "timestep" in inspect.signature(type(module).forward).parameters
    ]
    if len(found) != 1:
        names = [name for name, _ in found] or "none"
        raise InputError(
            f"{type(pipe).__name__} has {len(found)} components whose forward takes a timestep ({names}); "
            "exactly one denoiser is supported, pass a pipeline with one"
        )
    return found[0]


def is_intercepted(denoiser: nn.Module) -> bool:
    """Whether an `intercept` context is active for this denoiser."""
    registry = getattr(denoiser, "_diffusers_hook", None)
    return registry is not None and registry.get_hook(_HOOK) is not None


@contextmanager
def intercept(pipe: Any, handler: StepHandler) -> Iterator[None]:
    """Route the guided denoiser calls of `pipe` to `handler` until the context ends; everything is restored then."""
    from diffusers.hooks import HookRegistry, ModelHook

    _, denoiser = find_denoiser(pipe)
    watcher = _Watcher(pipe, denoiser, handler)

    class RouteToHandler(ModelHook):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return watcher.call(self.fn_ref.original_forward, args, kwargs)

    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    registry.register_hook(RouteToHandler(), _HOOK)
    watcher.watch_scheduler()
    try:
        yield
    finally:
        registry.remove_hook(_HOOK)
        watcher.release_scheduler()


class _Watcher:
    """Turns the stream of denoiser calls into generations and steps."""

    def __init__(self, pipe: Any, denoiser: nn.Module, handler: StepHandler) -> None:
        self._pipe, self._denoiser, self._handler = pipe, denoiser, handler
        self._latents, self._timestep, self._return_dict = _forward_parameters(denoiser)
        self._scheduler: Any = None
        self._fresh = True
        self._covered = False
        self._step = self._num_steps = 0
        self._signature: CallSignature | None = None

    def watch_scheduler(self) -> None:
        """Hook `set_timesteps` of the pipeline's present scheduler (it may be replaced at any time)."""
        scheduler = self._pipe.scheduler
        original = scheduler.set_timesteps

        @functools.wraps(original)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self._fresh = True
            return original(*args, **kwargs)

        scheduler.set_timesteps = set_timesteps
        self._scheduler, self._fresh = scheduler, True

    def release_scheduler(self) -> None:
        """Undo `watch_scheduler`."""
        self._scheduler.__dict__.pop("set_timesteps", None)

    def call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One denoiser call: a step for the handler, or the original forward."""
        if self._pipe.scheduler is not self._scheduler:
            self.release_scheduler()
            self.watch_scheduler()
        signature, tensors = flatten_call(self._denoiser, args, kwargs)
        if self._fresh:
            self._begin(signature, tensors)
        if not self._covered or signature != self._signature or self._step >= self._num_steps:
            return original(*args, **kwargs)
        batch = tensors[self._latents].shape[0]
        call = GuidedCall(step=self._step, num_steps=self._num_steps, inputs=_split(tensors, batch))
        self._step += 1
        pair = self._handler.step(call)
        estimate = torch.cat([pair[branch] for branch in BRANCHES])
        return self._wrap(estimate, kwargs)

    def _begin(self, signature: CallSignature, tensors: Mapping[str, Tensor]) -> None:
        self._fresh = False
        self._step, self._signature, self._covered = 0, signature, False
        if not self._is_guided(tensors):
            return
        self._num_steps = self._count_steps(tensors[self._timestep])
        batch = tensors[self._latents].shape[0]
        self._covered = self._handler.start(self._num_steps, _branch_signature(signature, batch))

    def _is_guided(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether this call is batched guidance (one comparison of the latents per generation)."""
        latents = tensors[self._latents]
        batch = latents.shape[0]
        if batch % 2 or not torch.equal(*latents.chunk(2)):
            return False
        others = (t for path, t in tensors.items() if path not in (self._latents, self._timestep))
        return any(t.dim() and t.shape[0] == batch and not torch.equal(*t.chunk(2)) for t in others)

    def _count_steps(self, timestep: Tensor) -> int:
        """Denoiser calls left in this generation, the present one included."""
        timesteps = [float(t) for t in self._scheduler.timesteps.tolist()]
        first = float(timestep.reshape(-1)[0])
        start = min(range(len(timesteps)), key=lambda i: (abs(timesteps[i] - first), i))
        return len(timesteps) - start

    def _wrap(self, estimate: Tensor, kwargs: Mapping[str, Any]) -> Any:
        if kwargs.get("return_dict", self._return_dict):
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            return Transformer2DModelOutput(sample=estimate)
        return (estimate,)


def _forward_parameters(denoiser: nn.Module) -> tuple[str, str, bool]:
    """Names of the latents and timestep parameters, and the default of `return_dict`."""
    parameters = list(inspect.signature(type(denoiser).forward).parameters.values())[1:]
    return_dict = next((p.default for p in parameters if p.name == "return_dict"), True)
    return parameters[0].name, "timestep", bool(return_dict)


def _split(tensors: Mapping[str, Tensor], batch: int) -> dict[Branch, dict[str, Tensor]]:
    """Per-branch halves of every leaf that carries the guidance batch; other leaves are shared."""
    inputs: dict[Branch, dict[str, Tensor]] = {branch: {} for branch in BRANCHES}
    for path, tensor in tensors.items():
        halves = tensor.chunk(2) if tensor.dim() and tensor.shape[0] == batch else (tensor, tensor)
        for branch, half in zip(BRANCHES, halves):
            inputs[branch][path] = half
    return inputs


def _branch_signature(signature: CallSignature, batch: int) -> CallSignature:
    leaves = tuple(
        leaf.model_copy(update={"shape": (batch // 2, *leaf.shape[1:])}) if leaf.shape and leaf.shape[0] == batch
        else leaf
        for leaf in signature.leaves
    )
    return CallSignature(leaves=leaves)
