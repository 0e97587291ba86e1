"""A denoiser and a pipeline small enough to run hundreds of generations in a test.

The pipeline follows the contract that diffusers pipelines share: components, a scheduler with `set_timesteps`, batched
guidance in the order [uncond, cond]. Its denoiser can be told through the prompt to fail in the process that evaluates
the conditional branch.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from hybridiff_compiler.ir import (
    AdaptiveSchedule,
    CallSignature,
    FixedSchedule,
    ModelInfo,
    Partition,
    Pattern,
    Plan,
    RankSpec,
)
from hybridiff_compiler.runtime.branch_calls import capture_branch
from hybridiff_compiler.runtime.intercept import intercept

WIDTH, SIZE, TOKENS = 8, 8, 5
FAIL_RAISE, FAIL_HANG, FAIL_KILL = 1e6, 2e6, 3e6


@torch.library.custom_op("hybridiff_tests::trip", mutates_args=())
def trip(hidden: Tensor, prompt: Tensor) -> Tensor:
    """Identity, unless the prompt holds one of the `FAIL_` codes."""
    code = float(prompt.flatten()[0])
    if code == FAIL_RAISE:
        raise ArithmeticError("tripped on purpose")
    if code == FAIL_KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    while code == FAIL_HANG:
        time.sleep(0.01)
    return hidden.clone()


@trip.register_fake
def _(hidden: Tensor, prompt: Tensor) -> Tensor:
    return torch.empty_like(hidden)


class TinyBlock(nn.Module):
    """Residual convolution with a prompt-dependent shift."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.shift = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """(B, WIDTH, SIZE, SIZE), (B, WIDTH) -> (B, WIDTH, SIZE, SIZE)."""
        return hidden + torch.tanh(self.conv(hidden) + self.shift(embedding)[:, :, None, None])


class TinyDenoiser(nn.Module):
    """Six blocks with one long skip."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, WIDTH, 3, padding=1)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(TinyBlock() for _ in range(6))
        self.tail = nn.Conv2d(2 * WIDTH, 4, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        """(B, 4, SIZE, SIZE), (), (B, TOKENS, WIDTH) -> an estimate of the sample's shape."""
        embedding = self.embed(encoder_hidden_states.mean(1)) + torch.sin(timestep / 100)
        hidden = first = trip(self.head(sample), encoder_hidden_states)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return (self.tail(torch.cat([hidden, first], 1)),)


class TinyScheduler:
    """Euler steps."""

    def __init__(self) -> None:
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Start of a generation."""
        self.timesteps = torch.linspace(1000, 1, num_inference_steps)


class TinyPipeline:
    """Batched guidance around `TinyDenoiser`."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.denoiser = TinyDenoiser().eval()
        self.scheduler = TinyScheduler()

    @property
    def components(self) -> dict[str, object]:
        """As in diffusers."""
        return {"denoiser": self.denoiser, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(
        self, prompt: int = 0, *, num_inference_steps: int = 8, guidance_scale: float = 3.0, size: int = SIZE,
        tokens: int = TOKENS, code: float = 0.0, images: int = 1, callback: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Latents (images, 4, size, size) of the prompt with this number; `code` is one of the `FAIL_` codes."""
        generator = torch.Generator().manual_seed(prompt)
        latents = torch.randn(images, 4, size, size, generator=generator)
        embeddings = torch.randn(2, tokens, WIDTH, generator=generator).repeat_interleave(images, 0)
        if code:
            embeddings[images, 0, 0] = code
        guided = guidance_scale > 1
        self.scheduler.set_timesteps(num_inference_steps)
        for index, timestep in enumerate(self.scheduler.timesteps):
            batch = torch.cat([latents] * 2) if guided else latents
            (estimate,) = self.denoiser(batch, timestep, embeddings if guided else embeddings[1:], return_dict=False)
            if guided:
                uncond, cond = estimate.chunk(2)
                estimate = uncond + guidance_scale * (cond - uncond)
            latents = latents - estimate / num_inference_steps
            if callback is not None:
                callback(index)
        return latents


class SignatureRecorder:
    """A step handler that covers nothing and notes the signature of one branch's call."""

    signature: CallSignature

    def start(self, num_steps: int, signature: CallSignature) -> bool:
        """Note it."""
        self.signature = signature
        return False

    def step(self, call: object) -> dict:
        """Never called."""
        raise AssertionError


TWO_RANKS = (
    ("single", "u0@0 c0@0 | cfg", "whole"),
    ("branch", "u0@0 c0@1 | cfg", "whole"),
    ("swapped", "u0@1 c0@0 | cfg", "whole"),
    ("reuse", "- | last", "whole"),
    ("paper", "u0@0(c1~) c1@1(u0~) | mirror", "nested"),
    ("cond-delta", "c0@0(c1~) c1@1(c0~) | delta", "nested"),
    ("cond-mirror", "c0@0(c1~) c1@1(c0~) | mirror", "nested"),
    ("branch-reuse", "u1@0(u0~) c1@1(c0~) | cfg", "nested"),
    ("moved", "c0@1(c1~) u1@0(u0~) c1@0(c0~) | cfg", "nested"),
    ("remote", "u0@1(u1~) c0@1(c1~) c1@1(c0~) u1@1(u0~) | cfg", "nested"),
    ("pipe", "u0@0(u1~) c0@0(c1~) u1@1(u0~) c1@1(c0~) | cfg", "nested"),
    ("paper-linear", "u0@0(c1~) c1@1(u0~) | mirror", "linear"),
    ("cond-linear", "c0@0(c1~) c1@1(c0~) | delta", "linear"),
    ("fresh-linear", "c0@1(c1~) c1@0 | delta", "linear"),
    ("back-linear", "c1@1(c0~) u1@0(u0~) | cfg", "linear"),
)
ONE_RANK = (("single", "u0@0 c0@0 | cfg", "whole"), ("reuse", "- | last", "whole"))
FOUR_RANKS = (
    ("branch", "u0@0 c0@1 | cfg", "whole"),
    ("far", "u0@2 c0@3 | cfg", "whole"),
    ("branch-x-pipe", "u0@0(u1~) u1@1(u0~) c0@2(c1~) c1@3(c0~) | cfg", "nested"),
    ("crossed", "u0@3(u1~) u1@2(u0~) c0@1(c1~) c1@0(c0~) | cfg", "linear"),
    ("chain", "c0@1(c1~) c1@2 u0@3 u1@3 | cfg", "linear"),
    ("reuse", "- | last", "whole"),
)


def make_plan(
    denoiser: nn.Module, signature: CallSignature, steps: tuple[str, ...], *, ranks: int = 2,
    tables: tuple[tuple[str, str, str], ...] = TWO_RANKS, exact: str = "branch",
    device: Literal["cpu", "cuda"] = "cpu",
) -> Plan:
    """A plan for `denoiser` with a nested and a linear partition of its captured layers, in thirds and halves."""
    layers = capture_branch(denoiser, signature).layers
    names = layers.names
    third, half = len(names) // 3, len(names) // 2
    inner = names[third:2 * third]
    partitions = (
        Partition(name="nested", stages=(inner, tuple(name for name in names if name not in inner))),
        Partition(name="linear", stages=(names[:half], names[half:])),
    )
    return Plan(
        model=ModelInfo(
            name="test", denoiser=type(denoiser).__name__, fingerprint=layers.fingerprint(), parameter_bytes=0,
            dtype="float32", signature=signature,
        ),
        ranks=(RankSpec(device=device),) * ranks,
        partitions=partitions,
        patterns=tuple(
            Pattern.parse(name, table, partition=where, stages=1 if where == "whole" else 2)
            for name, table, where in tables
        ),
        exact=exact,
        schedule=FixedSchedule(steps=steps),
    )


def tiny_plan(pipe: TinyPipeline, steps: str = "branch", **kwargs) -> Plan:
    """A plan for a `TinyPipeline`; `steps` are pattern names, repeated from the last one up to 8."""
    recorder = SignatureRecorder()
    with intercept(pipe, recorder):
        pipe(num_inference_steps=1)
    names = steps.split()
    return make_plan(pipe.denoiser, recorder.signature, tuple(names + names[-1:] * (8 - len(names))), **kwargs)


def adaptive(plan: Plan, *, warmup: str = "branch", window: str = "paper", lag: int = 2) -> Plan:
    """The plan with an adaptive schedule of 8 steps."""
    schedule = AdaptiveSchedule(
        num_steps=8, warmup=warmup, window=window, history=2, eps=10.0, k=2, tau_cap=5, lag=lag
    )
    return Plan(**(dict(plan) | {"schedule": schedule}))
