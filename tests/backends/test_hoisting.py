"""What is computed once per generation: which part of a stage, the same numbers, and anew whenever it must be."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hybridiff_compiler.backends.cuda_graph import Replay, record_plainly
from hybridiff_compiler.backends.hoisting import Hoisted, hoist
from hybridiff_compiler.backends.kept import Remembered
from hybridiff_compiler.backends.stage_io import stage_inputs
from hybridiff_compiler.capture import capture


class Denoiser(nn.Module):
    """One cross-attention to a prompt, and a size that is embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.key, self.value, self.query, self.size = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor, added: dict[str, Tensor]) -> Tensor:
        hidden = sample + self.embed(torch.sin(timestep)[:, None] * torch.ones(16))
        hidden = hidden + self.size(added["size"].to(sample.dtype))
        return hidden + nn.functional.scaled_dot_product_attention(
            self.query(hidden), self.key(prompt), self.value(prompt) * 2
        )


def arguments(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, 6, 16, generator=generator), torch.rand(1, generator=generator),
        torch.randn(1, 4, 16, generator=generator), torch.arange(16).reshape(1, 1, 16) + seed,
    ]


def whole():  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    sample, timestep, prompt, size = arguments(0)
    return capture(Denoiser().eval(), (sample, timestep, prompt, {"size": size}), {}).whole()


def test_what_follows_from_steady_inputs_is_cut_out() -> None:
    stage = whole()
    assert stage.steady == ("prompt", "added.size")
    parts = hoist(stage)
    assert parts is not None
    linear = {
        name: sorted(str(n.args[1]) for n in part.module.graph.nodes if n.target is torch.ops.aten.linear.default)
        for name, part in (("once", parts.once), ("each", parts.each))
    }
    assert linear == {"once": ["key_weight", "size_weight", "value_weight"], "each": ["embed_weight", "query_weight"]}
    assert parts.once.inputs == ("prompt", "added.size")
    assert parts.once_takes == (2, 3)
    assert len(parts.once.values_out) == 3
    assert parts.each.values_in == parts.once.values_out
    assert [spec.name for spec in stage_inputs(parts.each)][:4] == list(stage.inputs)
    held = {node.target for node in parts.each.module.graph.nodes if node.op == "get_attr"}
    assert not any("key" in name for name in held), "weights of the hoisted part are not held twice"
    for seed in range(3):
        given = arguments(seed)
        got = Hoisted.build(parts, lambda part: part.module)(*given)
        torch.testing.assert_close(got[0], stage.module(*given)[0], rtol=0, atol=0)


def test_rearranging_is_not_worth_it() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            return self.layer(sample * timestep + prompt.mean(1, keepdim=True).expand(-1, 5, -1))

    given = (torch.randn(1, 5, 8), torch.ones(1), torch.randn(1, 3, 8))
    assert hoist(capture(Plain().eval(), given, {}).whole()) is None


def test_only_what_took_arithmetic_is_handed_over() -> None:
    """Large views of small results are made where they are read."""
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            return sample * timestep + self.layer(prompt).to(torch.float64)[:, None].expand(-1, 100, -1).float()

    given = (torch.randn(1, 100, 8), torch.ones(1), torch.randn(1, 8))
    parts = hoist(capture(Wide().eval(), given, {}).whole())
    assert parts is not None
    assert [(spec.shape, spec.dtype) for spec in stage_inputs(parts.each)[3:]] == [((1, 8), "float32")]


@pytest.fixture(params=["recorded", "called"])
def counted(request):  # type: ignore[no-untyped-def]
    """A stage, what runs it, and a function that tells how often the hoisted part was computed by a right call."""
    stage = whole()
    parts = hoist(stage)
    assert parts is not None
    calls: list[int] = []

    def once(*given: Tensor):  # type: ignore[no-untyped-def]
        calls.append(1)
        return parts.once.module(*given)

    specs = [(spec.shape, getattr(torch, spec.dtype)) for spec in stage_inputs(stage)]
    hoisted = replace(Hoisted.build(parts, lambda part: part.module), once=once)
    if request.param == "recorded":
        replay = Replay(hoisted, specs, torch.device("cpu"), record_plainly)
        runs, call = replay, partial(replay, leaves=4)
    else:
        runs = call = Remembered(hoisted)

    def check(given: list[Tensor]) -> int:
        before = len(calls)
        torch.testing.assert_close(call(*given)[0], stage.module(*given)[0], rtol=0, atol=0)
        return len(calls) - before

    return stage, runs, check


def test_it_is_computed_anew_only_when_an_input_changed(counted) -> None:  # type: ignore[no-untyped-def]
    _, _, check = counted
    sample, timestep, prompt, size = arguments(0)
    assert check([sample, timestep, prompt, size]) == 1
    for seed in range(1, 4):
        other = arguments(seed)
        assert check([other[0], other[1], prompt, size]) == 0
    prompt.mul_(2)
    assert check([sample, timestep, prompt, size]) == 1, "written to in place"
    assert check([sample, timestep, prompt.clone(), size]) == 1
    with torch.inference_mode():
        hidden = prompt.clone()
        assert [check([sample, timestep, hidden, size]) for _ in range(2)] == [1, 1], "inference tensors cannot be told"


def test_two_branches_in_turn_keep_their_results(counted) -> None:  # type: ignore[no-untyped-def]
    _, _, check = counted
    one, other = arguments(0), arguments(1)
    first = [check(given) for given in (one, other) * 4]
    assert first[:2] == [1, 1]
    assert first[3:] == [0] * 5, "noticed at the third call at the latest"
    assert [check(arguments(seed)) for seed in (2, 3, 0)] == [1, 1, 1]
    assert [check(given) for given in (one, other) * 4] == [1, 1, 0, 0, 0, 0, 0, 0]


def test_a_new_generation_sees_new_weights(counted) -> None:  # type: ignore[no-untyped-def]
    stage, runs, check = counted
    given = arguments(0)
    check(given)
    with torch.no_grad():
        stage.module.key.weight.add_(1.0)
    runs.forget()
    assert check(given) == 1
