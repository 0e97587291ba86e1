"""Weights on a GPU that were written to behind torch's back are noticed beside what the GPU is doing."""

import torch
from torch import nn

from hybridiff_compiler.runtime.live_weights import LiveWeights


def test_writes_before_a_generation_are_noticed_while_its_first_step_runs() -> None:
    layer = nn.Sequential(nn.Conv2d(4, 9, 3).to(memory_format=torch.channels_last), nn.Linear(1000, 7)).cuda().half()
    busy = torch.randn(4096, 4096, device="cuda")
    weights = LiveWeights(layer)
    for tensor in layer.parameters():
        assert not weights.have_moved()
        for _ in range(20):
            busy = busy @ busy
        assert not weights.have_changed()
        tensor.data.mul_(1.5).add_(0.25)
        assert not weights.have_moved()
        for _ in range(20):
            busy = busy @ busy
        assert weights.have_changed()
        weights = LiveWeights(layer)
