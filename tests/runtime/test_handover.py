"""The denoiser's skeleton and tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hybridiff_compiler.ir import InputError
from hybridiff_compiler.runtime.handover import pack_skeleton, raw_bytes, unpack_skeleton

from .tiny import TinyPipeline


def hand_over(module: nn.Module) -> nn.Module:
    data, tensors = pack_skeleton(module)
    copy, empty = unpack_skeleton(data, "cpu")
    for source, target in zip(tensors, empty, strict=True):
        if source.numel():
            raw_bytes(target).copy_(raw_bytes(source))
    return copy


def test_equal_numbers_types_and_memory_formats() -> None:
    module = TinyPipeline().denoiser.to(memory_format=torch.channels_last)
    module.register_buffer("table", torch.arange(6).reshape(2, 3).t(), persistent=False)
    module.register_buffer("thin", torch.randn(3, 4).bfloat16()[:, ::2])
    module.flag = torch.tensor([True, False])
    module.head.weight.requires_grad_(False)
    copy = hand_over(module)
    theirs = dict(copy.named_parameters()) | dict(copy.named_buffers())
    mine = dict(module.named_parameters()) | dict(module.named_buffers())
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.requires_grad == theirs[name].requires_grad
        assert type(tensor) is type(theirs[name])
        if name != "thin":
            assert tensor.stride() == theirs[name].stride(), name
    assert torch.equal(copy.flag, module.flag)


def test_skeleton_is_small_and_tied_weights_stay_tied() -> None:
    module = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    module[1].weight = module[0].weight
    data, tensors = pack_skeleton(module)
    assert len(data) < 10_000
    assert len(tensors) == 3
    copy = hand_over(module)
    assert copy[1].weight is copy[0].weight


def test_hooked_forward_is_left_behind() -> None:
    module = nn.Linear(3, 3)
    module.forward = lambda x: x
    copy = hand_over(module)
    assert "forward" not in copy.__dict__
    assert torch.equal(copy(torch.ones(1, 3)), nn.Linear.forward(module, torch.ones(1, 3)))


def test_what_cannot_be_handed_over_is_named() -> None:
    module = nn.Linear(3, 3)
    module.extra = lambda x: x
    with pytest.raises(InputError, match="cannot be handed to a worker process"):
        pack_skeleton(module)
    with pytest.raises(InputError, match="only plain dense tensors"):
        pack_skeleton(nn.Linear(3, 3, device="meta"))
    local = type("Local", (nn.Linear,), {"__module__": "__main__"})(3, 3)
    with pytest.raises(InputError, match="move the class to a module"):
        pack_skeleton(nn.Sequential(local))
