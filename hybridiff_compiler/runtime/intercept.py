"""Watching an unmodified diffusers pipeline: which denoiser call is which step of which generation.

Nothing here knows a pipeline or model class. A generation starts when the scheduler's `set_timesteps` is called; its
step count is what the scheduler holds from the first timestep that reaches the denoiser on (so image-to-image
strengths work). Batched classifier-free guidance is recognised from the first call: two equal halves of latents whose
conditioning differs. Guidance by two calls per step, the conditional one first, is recognised from the second call, so
the first step's conditional estimate is the denoiser's own (see `two_calls`). Every call that does not fit goes to the
original forward.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..backends.kept import Moment
from ..capture import flatten_call, step_parameters
from ..capture.call import TIMESTEP
from ..ir import BRANCHES, Branch, CallSignature, InputError
from .halves import Halves
from .scheduler_watch import SchedulerWatch
from .two_calls import TwoCalls, differing_shapes

__all__ = ["GuidedCall", "StepHandler", "find_denoiser", "intercept", "is_intercepted"]

_HOOK = "hybridiff_compiler"


@dataclass(frozen=True)
class GuidedCall:
    """One denoising step as the pipeline asked for it."""

    step: int
    num_steps: int
    inputs: Mapping[Branch, Mapping[str, Tensor]]
    """Per branch: leaf path -> tensor of that branch alone (views of the pipeline's tensors)."""
    timesteps: Tensor | None = None
    """`[num_steps]`: the timesteps of all steps as the denoiser gets them, if it gets the scheduler's own."""

    @property
    def moment(self) -> Moment | None:
        """Which step this is among all of them, if they are known."""
        return None if self.timesteps is None else Moment(self.timesteps, self.step)


class StepHandler(Protocol):
    """What runs the denoising steps in the pipeline's place."""

    def start(self, num_steps: int, signature: CallSignature) -> bool:
        """A generation begins; `signature` is one branch's call. False: run this generation without the handler."""

    def step(self, call: GuidedCall) -> Mapping[Branch, Tensor] | None:
        """The pair of estimates of one step; None: run it and the rest of the generation without the handler."""


def find_denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """Attribute name and module of the pipeline's denoiser: the component whose forward takes a timestep.

    Of several it is the one that takes no `conditioning_scale`, which is what controls another (ControlNets) have.

    Raises:
        InputError: the pipeline has none, or several.
    """
    found = [
        (name, module) for name, module in pipe.components.items()
        if isinstance(module, nn.Module) and TIMESTEP in inspect.signature(type(module).forward).parameters
    ]
    alone = [
        (name, module) for name, module in found
        if "conditioning_scale" not in inspect.signature(type(module).forward).parameters
    ]
    wrapped = [name for name, module in pipe.components.items() if hasattr(module, "_orig_mod")]
    if not alone and wrapped:
        raise InputError(
            f"the {wrapped[0]} of {type(pipe).__name__} is what torch.compile made of a module; give the pipeline the "
            f"module itself (pipe.{wrapped[0]} = pipe.{wrapped[0]}._orig_mod): the stage graphs of a plan are compiled "
            "from that"
        )
    found = alone or found
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
def intercept(
    pipe: Any, handler: StepHandler, *, settle: Callable[[], None] | None = None,
    exact_at: Callable[[int, int], bool] = lambda step, num_steps: False, left: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Route the guided denoiser calls of `pipe` to `handler` until the context ends; everything is restored then.

    Args:
        pipe: the pipeline.
        handler: computes the steps.
        settle: called before the scheduler is, if that would wait for the device (see `waiting`).
        exact_at: whether the handler computes this step, of so many, of the present generation exactly; asked when the
            step begins.
        left: called before the denoiser's own forward when the handler has computed earlier steps of the generation.
    """
    from diffusers.hooks import HookRegistry, ModelHook

    _, denoiser = find_denoiser(pipe)
    watcher = _Watcher(pipe, denoiser, handler, settle, exact_at, left)
    call = watcher.call
    if denoiser._compiled_call_impl is not None:  # by `denoiser.compile()`: dynamo would trace the handler, too
        call = torch.compiler.disable(call)

    class RouteToHandler(ModelHook):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return call(self.fn_ref.original_forward, args, kwargs)

    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    registry.register_hook(RouteToHandler(), _HOOK)
    watcher.scheduler.follow()
    try:
        yield
    finally:
        registry.remove_hook(_HOOK)
        watcher.scheduler.release()


class _Watcher:
    """Turns the stream of denoiser calls into generations and steps."""

    def __init__(
        self, pipe: Any, denoiser: nn.Module, handler: StepHandler, settle: Callable[[], None] | None,
        exact_at: Callable[[int, int], bool], left: Callable[[], None],
    ) -> None:
        self.scheduler = SchedulerWatch(pipe, settle)
        self._exact_at, self._left = exact_at, left
        self._begins_exactly = self._has_run = False
        self._halves = Halves()
        self._denoiser, self._handler = denoiser, handler
        self._latents, self._timestep = step_parameters(denoiser)
        parameters = inspect.signature(type(denoiser).forward).parameters
        self._return_dict = "return_dict" not in parameters or bool(parameters["return_dict"].default)
        self._covered = False
        self._step = self._num_steps = 0
        self._signature: CallSignature | None = None
        self._first: Mapping[str, Tensor] | None = None
        """The first call of a generation, until the second one tells whether it was half of a pair."""
        self._pairs: TwoCalls | None = None
        self._pending: tuple[Mapping[str, Tensor], Tensor] | None = None
        """Inputs and estimate of the second call that is to come."""
        self._tells_timesteps = False
        """Whether the present generation's first timestep was the scheduler's own."""
        self._said: set[str] = set()

    def call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One denoiser call: a step for the handler, or the original forward."""
        self.scheduler.follow()
        signature, tensors = flatten_call(self._denoiser, args, kwargs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
            self._leave("gradients are asked for, which only the denoiser as it is can give")
        elif self.scheduler.fresh:
            self._begin(signature, tensors)
        elif self._first is not None:
            self._begin_pairs(signature, tensors)
        estimate = None
        if self._covered and signature == self._signature:
            estimate = self._batched(tensors) if self._pairs is None else self._one_of_two(tensors, self._pairs)
        if estimate is not None:
            return self._wrap(estimate, kwargs)
        if self._has_run:
            self._left()
        return original(*args, **kwargs)

    def _batched(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Both estimates of a step, one after the other in the batch; None: not covered."""
        if self._step >= self._num_steps:
            return None
        if self._step == 1:
            self._halves.ask(tensors[self._latents])
            self._begins_exactly = self._exact_at(1, self._num_steps)
        if self._step == (2 if self._begins_exactly else 1) and not self._halves.equal():
            # Images of one seed without guidance begin like the two branches of one, and part after the first step. An
            # exact step is right for both.
            self._covered = False
            return None
        pair = self._run(_split(tensors, tensors[self._latents].shape[0]), tensors[self._timestep])
        if pair is None:
            return None
        return torch.cat([pair[branch] for branch in BRANCHES])

    def _one_of_two(self, tensors: Mapping[str, Tensor], pairs: TwoCalls) -> Tensor | None:
        """The estimate of one of a step's two calls; None: not covered."""
        uncond, cond = BRANCHES
        if self._pending is not None:
            (expected, estimate), self._pending = self._pending, None
            if pairs.fits(expected, tensors):
                return estimate.clone()  # as below: pipelines may write to it, and buffers are used again
            self._covered = False
            self._say_once(
                "the inputs of a step's second call were not what the steps before let expect (guidance may have been "
                "switched off, or the negative prompt exchanged); the rest of this generation runs on one device"
            )
            return None
        if self._step >= self._num_steps:
            return None
        inputs = pairs.inputs(tensors)
        pair = self._run(inputs, tensors[self._timestep])
        if pair is None:
            return None
        self._pending = inputs[uncond], pair[uncond]
        return pair[cond].clone()

    def _leave(self, reason: str) -> None:
        """Give the rest of a generation to the original forward."""
        if self.scheduler.fresh or self._covered:
            self._say_once(f"{reason}; the rest of this generation runs on one device")
        self.scheduler.fresh = self._covered = False
        self._first = self._pairs = self._pending = None

    def _run(
        self, inputs: Mapping[Branch, Mapping[str, Tensor]], timestep: Tensor
    ) -> Mapping[Branch, Tensor] | None:
        timesteps = self.scheduler.timesteps(timestep, self._step)
        if self._step == 0:
            self._tells_timesteps = timesteps is not None
        elif self._tells_timesteps and timesteps is None:
            # Another pipeline with this denoiser, after a generation that ended early, would go on with its state.
            self._leave("the timesteps are no longer those of the pipeline's scheduler that the generation began with")
            return None
        call = GuidedCall(step=self._step, num_steps=self._num_steps, inputs=inputs, timesteps=timesteps)
        self._step += 1
        pair = self._handler.step(call)
        self._covered, self._has_run = self._covered and pair is not None, pair is not None
        return pair

    def _begin(self, signature: CallSignature, tensors: Mapping[str, Tensor]) -> None:
        self.scheduler.fresh = self._has_run = False
        self._step, self._signature, self._covered = 0, signature, False
        self._first = self._pairs = self._pending = None
        if self._latents not in tensors or self._timestep not in tensors:
            return
        self._num_steps = self.scheduler.begin(tensors[self._timestep])
        if not self._is_guided(tensors):
            self._first = tensors
            return
        batch = tensors[self._latents].shape[0]
        self._covered = self._handler.start(self._num_steps, _branch_signature(signature, batch))

    def _begin_pairs(self, signature: CallSignature, tensors: Mapping[str, Tensor]) -> None:
        """The second call of a generation: whether it is the other branch of the first step."""
        assert self._signature is not None
        first, self._first = self._first, None
        assert first is not None
        if signature != self._signature:
            shapes = differing_shapes(self._signature, signature)
            if shapes is not None and _is_one_state(first, tensors, self._latents):
                self._say_once(
                    f"the two calls of a guided step differ in shape ({shapes}), so they run one after the other on "
                    "one device; pad prompt and negative prompt to one length"
                )
            return
        if not TwoCalls.is_pair(first, tensors, self._latents, self._timestep):
            return
        if not self._handler.start(self._num_steps, signature):
            return
        self._covered, self._pairs = True, TwoCalls(first, tensors, self._latents)
        # The conditional estimate has been given out; the handler still has to see the whole step.
        inputs = self._pairs.inputs(first)
        pair = self._run(inputs, first[self._timestep])
        if pair is not None:
            self._pending = inputs[BRANCHES[0]], pair[BRANCHES[0]]

    def _is_guided(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether this call is batched guidance (one comparison of the latents per generation)."""
        latents = tensors[self._latents]
        batch = latents.shape[0]
        if batch % 2 or not torch.equal(*latents.chunk(2)):
            return False
        others = (t for path, t in tensors.items() if path not in (self._latents, self._timestep))
        return any(t.dim() and t.shape[0] == batch and not torch.equal(*t.chunk(2)) for t in others)

    def _wrap(self, estimate: Tensor, kwargs: Mapping[str, Any]) -> Any:
        if kwargs.get("return_dict", self._return_dict):
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            return Transformer2DModelOutput(sample=estimate)
        return (estimate,)

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"hybridiff: {message}", stacklevel=2)


def _is_one_state(first: Mapping[str, Tensor], second: Mapping[str, Tensor], latents: str) -> bool:
    return first[latents].shape == second[latents].shape and torch.equal(first[latents], second[latents])


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
