"""A denoiser of plain operations under the pipeline of the runtime's tests, small enough to be compiled in a test."""

from __future__ import annotations

import torch
from runtime.tiny import WIDTH, TinyDenoiser, TinyPipeline, tiny_plan
from torch import Tensor, nn

from hybridiff_compiler.ir import Plan

TABLES = (
    ("branch", "u0@0 c0@1 | cfg", "whole"),
    ("branch-reuse", "u1@0(u0~) c1@1(c0~) | cfg", "nested"),
    ("reuse", "- | last", "whole"),
)


FREQUENCIES = 96


class PlainDenoiser(TinyDenoiser):
    """`TinyDenoiser` without the operator that can fail, with an embedding of the timestep wide enough to be computed
    for many steps at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(FREQUENCIES, WIDTH)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        """As the parent's."""
        steps = torch.arange(1, FREQUENCIES + 1, device=timestep.device) / FREQUENCIES
        waves = torch.sin(timestep.reshape(-1, 1) / 100 * steps)
        embedding = self.embed(encoder_hidden_states.mean(1)) + self.time(waves.to(sample.dtype))
        hidden = first = self.head(sample)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return (self.tail(torch.cat([hidden, first], 1)),)


class PlainPipeline(TinyPipeline):
    """`TinyPipeline` around a `PlainDenoiser`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        torch.manual_seed(seed)
        self.denoiser = PlainDenoiser().eval()


def small_plan(pipe: PlainPipeline) -> Plan:
    """Two ranks, two graphs: the whole denoiser, and the outer stage that reads the inner one stale."""
    return tiny_plan(pipe, "branch branch branch-reuse reuse branch branch-reuse", tables=TABLES)
