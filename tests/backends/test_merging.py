"""Merged linear layers: which ones, the same numbers, and weights that stay the denoiser's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hybridiff_compiler.backends.merging import join_parameters, merge_linears
from hybridiff_compiler.capture import capture
from hybridiff_compiler.ir import InputError


class Attention(nn.Module):
    """Three projections of one input, of which two have the same one, and a fourth layer of another module."""

    def __init__(self, bias: bool = True, tie: bool = False) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(24, size, bias=bias) for size in (32, 16, 48))
        self.other = nn.Sequential(nn.Linear(24, 32, bias=bias))
        if tie:
            self.to_k = self.to_q

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states * timestep
        q, k, v = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        other = self.other(hidden_states)
        return torch.cat([q.reshape(q.shape[0], -1, 8).mean(-1), k[..., 0], v.amax(-1), other[..., 1]], -1)


def captured(module: nn.Module):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    given = (torch.randn(2, 5, 24, generator=generator), torch.tensor(0.7))
    return capture(module.eval(), given, {}), given


def count_linear(stage) -> int:  # type: ignore[no-untyped-def]
    return sum(node.target is torch.ops.aten.linear.default for node in stage.module.graph.nodes)


@pytest.mark.parametrize("bias", [True, False])
def test_projections_of_one_input_become_one(bias: bool) -> None:
    module = Attention(bias)
    known = copy.deepcopy(module.state_dict())
    found, given = captured(module)
    stage = found.whole()
    expected = stage.module(*given)[0]
    merged = merge_linears(stage)
    assert (count_linear(stage), count_linear(merged.stage)) == (4, 2)
    assert sorted(merged.sources.values())[-1] == ("to_q.weight", "to_k.weight", "to_v.weight")
    assert len(merged.sources) == 1 + bias
    torch.testing.assert_close(merged.stage.module(*given)[0], expected)
    for name, value in module.state_dict().items():
        assert torch.equal(value, known[name]), name
    torch.testing.assert_close(stage.module(*given)[0], expected, rtol=0, atol=0)


def test_weights_stay_live() -> None:
    module = Attention()
    found, given = captured(module)
    stage = found.whole()
    merged = merge_linears(stage).stage
    with torch.no_grad():
        module.to_k.weight.add_(1.0)
        module.to_v.bias.mul_(3.0)
    torch.testing.assert_close(merged.module(*given)[0], module(*given))


def test_merging_twice_moves_nothing_again() -> None:
    module = Attention()
    found, given = captured(module)
    merge_linears(found.whole())
    places = {name: p.data_ptr() for name, p in module.named_parameters()}
    again = merge_linears(found.whole())
    assert again.sources
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == places
    torch.testing.assert_close(again.stage.module(*given)[0], module(*given))


def test_weights_are_joined_again_after_some_were_exchanged() -> None:
    """As fusing a LoRA into some projections does."""
    module = Attention()
    found, given = captured(module)
    merge_linears(found.whole())
    with torch.no_grad():
        module.to_k.weight.data = module.to_k.weight * 2
    again = merge_linears(found.whole())
    assert len(again.sources) == 2
    torch.testing.assert_close(again.stage.module(*given)[0], module(*given))
    assert module.to_v.weight.data_ptr() == module.to_k.weight.data_ptr() + module.to_k.weight.nbytes


def test_a_layer_that_is_used_twice_is_left_alone() -> None:
    found, given = captured(Attention(tie=True))
    stage = found.whole()
    merged = merge_linears(stage)
    assert count_linear(merged.stage) == count_linear(stage)
    torch.testing.assert_close(merged.stage.module(*given)[0], stage.module(*given)[0], rtol=0, atol=0)


def test_parts_of_other_memory_are_not_moved() -> None:
    storage = torch.randn(64, 8)
    first, second = (nn.Parameter(storage[begin:begin + 16]) for begin in (0, 32))
    with pytest.raises(InputError, match="cannot share memory"):
        join_parameters([first, second])
    neighbours = [nn.Parameter(storage[begin:begin + 16]) for begin in (0, 16)]
    joint = join_parameters(neighbours)
    assert joint.data_ptr() == storage.data_ptr()
    assert torch.equal(joint, storage[:32])


def test_weights_of_several_kinds_are_not_joined() -> None:
    pairs = [
        (torch.randn(16, 4), torch.randn(16, 4, dtype=torch.float64)), (torch.randn(16, 4), torch.randn(16, 5)),
        (torch.randn(16, 4), torch.randn(4, 16).t()), (torch.randn(4, 4), torch.randn(4, 4)),
        (torch.randn(16, 4, device="meta"), torch.randn(16, 4, device="meta")),
    ]
    for pair in pairs:
        with pytest.raises(InputError, match="cannot share memory"):
            join_parameters(pair)
