"""Weights that were written to are noticed, whoever wrote and however."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hybridiff_compiler.runtime.live_weights import LiveWeights
from hybridiff_compiler.runtime.parallelize import parallelize

from .tiny import TinyPipeline, tiny_plan


def add_to_data(weight: Tensor) -> None:
    """As PEFT fuses a LoRA: torch counts no version."""
    weight.data += 0.25


def in_inference_mode(weight: Tensor) -> None:
    with torch.inference_mode():
        weight.mul_(1.5)


def through_numpy(weight: Tensor) -> None:
    array = weight.detach().numpy()
    array[...] = array * 1.5


EDITS = [add_to_data, lambda weight: weight.data.mul_(1.5), in_inference_mode, through_numpy]


@pytest.mark.parametrize("edit", EDITS)
def test_writes_are_noticed(edit: Callable[[Tensor], None]) -> None:
    layer = nn.Sequential(nn.Conv2d(4, 9, 3).to(memory_format=torch.channels_last), nn.Linear(1000, 7))
    weights = LiveWeights(layer)
    for tensor in layer.parameters():
        assert not weights.have_moved()
        assert not weights.have_changed()
        edit(tensor)
        assert not weights.have_moved()
        assert weights.have_changed()
        weights = LiveWeights(layer)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = nn.Linear(8, 8)
        weights = LiveWeights(layer)
    assert not weights.have_changed()
    with torch.inference_mode():
        layer.weight.mul_(2)  # no version tells
    assert weights.have_changed()


def test_what_is_no_number_and_what_takes_no_memory() -> None:
    layer = nn.Linear(3, 3)
    layer.register_buffer("mask", torch.tensor([True, False]))
    layer.register_buffer("empty", torch.zeros(0, 4))
    layer.register_buffer("expanded", torch.zeros(()).expand(1 << 30, 1 << 10))
    layer.weight.data.fill_(float("nan"))
    assert not LiveWeights(layer).have_changed()


@pytest.mark.parametrize("tensor", [
    torch.zeros(7, 100), torch.zeros(100, 7).T, torch.zeros(3, 64, 5, 5).to(memory_format=torch.channels_last),
    torch.zeros(50, 60)[::2, ::3], torch.zeros(40)[::4],
])
def test_samples_are_from_all_over(tensor: Tensor) -> None:
    layer = nn.Module()
    layer.register_buffer("weight", tensor)
    weights = LiveWeights(layer)
    for dim, size in enumerate(tensor.shape):
        for half in tensor.split(-(-size // 2), dim):
            half.data += 1
            assert weights.have_changed()
            weights = LiveWeights(layer)


def test_a_lora_fused_while_open_is_in_the_image() -> None:
    """The workers hold the weights as they were."""
    pipe = TinyPipeline()
    with parallelize(pipe, tiny_plan(pipe), threads=1):
        pipe(1)
        add_to_data(pipe.denoiser.blocks[2].conv.weight)
        with pytest.warns(UserWarning, match="weights or modules changed"):
            image = pipe(1)
    assert torch.equal(image, pipe(1))


class Processor:
    """What modules hold for settings that are neither modules nor tensors, as attention processors are."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self) -> None:
        """Never called."""


def test_settings_of_modules_are_part_of_what_was_captured() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4))
    module[0].processor = Processor(1.0)
    module[0].scaling = {"adapter": 1.0}
    weights = LiveWeights(module)

    def changed() -> bool:
        assert not weights.have_moved()
        return weights.have_changed()

    module.train()
    module[1].freedom = None  # as diffusers takes a setting back
    module[1].cache = {"a": torch.zeros(1)}
    assert not changed()
    for owner, name, value in (
        (module[1], "eps", 1e-3), (module[0].processor, "scale", 0.5), (module[0], "scaling", {"adapter": 2.0}),
        (module[0], "processor", object()), (module[1], "freedom", 0.9),
    ):
        before = getattr(owner, name)
        setattr(owner, name, value)
        assert changed(), name
        setattr(owner, name, before)
        assert not changed(), name
    module[0].scaling["adapter"] = 3.0
    assert changed()
