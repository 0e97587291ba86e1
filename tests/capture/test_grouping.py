"""The grouping rule, on module paths and small graphs."""

import torch
from torch import nn

from hybridiff_compiler.capture import capture
from hybridiff_compiler.capture.grouping import find_containers

TRANSFORMER = {
    "": "Net",
    "proj": "Linear",
    "blocks.0": "Block",
    "blocks.0.attn": "Attention",
    "blocks.0.attn.to_out.0": "Linear",
    "blocks.0.attn.to_out.1": "Dropout",
    "blocks.0.ff": "FeedForward",
    "blocks.0.ff.net.0": "GEGLU",
    "blocks.0.ff.net.0.proj": "Linear",
    "blocks.0.ff.net.1": "Dropout",
    "blocks.0.ff.net.2": "Linear",
}


def test_lists_with_primitive_elements_do_not_make_containers():
    assert find_containers(TRANSFORMER) == {""}


def test_owners_of_block_lists_and_their_ancestors_are_containers():
    nested = {f"stages.1.inner.{path}".rstrip("."): name for path, name in TRANSFORMER.items()}
    assert find_containers({"": "Net", "stages.1": "Stage", **nested}) == {"", "stages.1", "stages.1.inner"}


def test_adapters_inside_a_block_do_not_make_it_a_container():
    adapted = {**TRANSFORMER, "blocks.0.ff.net.2.base_layer": "Linear", "blocks.0.attn.to_out.0.lora_A.0": "Linear"}
    assert find_containers(adapted) == {""}


class Net(nn.Module):
    """A residual step around every block, and a skip that is concatenated in front of the head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))
        self.head = nn.Linear(16, 8)
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, sample):
        skip = hidden = self.stem(sample.exp())
        for block in self.blocks:
            hidden = hidden + block(hidden)
        first, second = torch.cat([hidden, skip], -1).tanh().chunk(2, -1)
        return (torch.sigmoid(self.head(torch.cat([second, first], -1)) @ self.weight),)


def test_glue_joins_its_neighbours():
    captured = capture(Net(), (torch.ones(2, 8),), {})
    graph = captured.layers
    assert graph.names == ("stem", "blocks.0", "blocks.1", "head", "forward")
    assert [layer.kind for layer in graph.layers] == ["Linear", "Sequential", "Sequential", "Linear", "Net"]
    assert {captured.layer_of[name] for name in ("exp", "linear")} == {"stem"}
    assert captured.layer_of["add_1"] == "blocks.1"  # the residual sum: one tensor leaves instead of two
    assert captured.layer_of["cat"] == "head"  # the concatenation: its parts would cross anyway
    assert {captured.layer_of[name] for name in ("chunk", "getitem", "getitem_1")} == {"head"}
    assert captured.layer_of["sigmoid"] == graph.output == "forward"


def test_costs_of_layers():
    graph = capture(Net(), (torch.ones(2, 8),), {}).layers
    stem, block, _, head, tail = graph.layers
    assert (stem.flops, block.flops, head.flops, tail.flops) == (256, 256, 512, 256)
    assert (stem.parameter_bytes, block.parameter_bytes) == (288, 288 + 64)
    assert (head.parameter_bytes, tail.parameter_bytes) == (544, 256)
    skip, *_, last = graph.values
    assert (skip.producer, skip.consumers) == ("stem", ("blocks.0", "head"))
    assert (last.shape, last.dtype, last.nbytes) == ((2, 8), "float32", 64)


class Looping(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample):
        return (self.one(self.two(self.one(sample))),)


def test_modules_that_run_twice_give_numbered_layers():
    graph = capture(Looping(), (torch.ones(1, 4),), {}).layers
    assert graph.names == ("one#0", "two", "one#1")


class Elementwise(nn.Module):
    def forward(self, sample):
        return (sample * 2 + 1,)


def test_a_denoiser_without_arithmetic_is_one_layer():
    graph = capture(Elementwise(), (torch.ones(2),), {}).layers
    assert graph.names == ("forward",)
    assert graph.values == ()
