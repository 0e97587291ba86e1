"""A denoiser of plain operations under the pipeline of the runtime's tests, small enough to be compiled in a test."""

from __future__ import annotations

import torch
from runtime.tiny import TinyDenoiser, TinyPipeline, tiny_plan
from torch import Tensor

from hybridiff_compiler.ir import Plan

TABLES = (
    ("branch", "u0@0 c0@1 | cfg", "whole"),
    ("branch-reuse", "u1@0(u0~) c1@1(c0~) | cfg", "nested"),
    ("reuse", "- | last", "whole"),
)


class PlainDenoiser(TinyDenoiser):
    """`TinyDenoiser` without the operator that can fail."""

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        """As the parent's."""
        embedding = self.embed(encoder_hidden_states.mean(1)) + torch.sin(timestep / 100)
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
