"""What follows from the timestep is computed for many steps at a time: which part, the same numbers, and when."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hybridiff_compiler.backends.cuda_graph import Replay, record_plainly
from hybridiff_compiler.backends.for_steps import STEPS
from hybridiff_compiler.backends.hoisting import Hoisted, hoist
from hybridiff_compiler.backends.kept import Moment, Remembered
from hybridiff_compiler.backends.stage_io import stage_inputs
from hybridiff_compiler.capture import capture

WIDTH, TOKENS = 80, 4
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Products of many rows add up in another order."""


class Denoiser(nn.Module):
    """Two blocks modulated by the timestep and a pooled prompt; the first one modulates the prompt as well."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.pooled, self.one, self.two, self.prompt, self.mix = (nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor, pooled: Tensor) -> Tensor:
        """(B, TOKENS, WIDTH), (B,), (B, TOKENS, WIDTH), (B, WIDTH) -> (B, TOKENS, WIDTH)."""
        waves = torch.sin(timestep[:, None] * torch.arange(1, WIDTH + 1) / WIDTH)
        embedding = nn.functional.silu(self.time(waves) + self.pooled(pooled))
        shift, scale = self.one(embedding).chunk(2, -1)
        shift, scale = torch.cat([shift, shift], -1)[:, None], torch.cat([scale, scale], -1)[:, None]
        context = self.prompt(prompt * (1 + scale) + shift)
        hidden = self.mix(sample * (1 + scale) + context)
        return hidden * self.two(embedding)[:, None]


def arguments(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, TOKENS, WIDTH, generator=generator), torch.rand(1, generator=generator),
        torch.randn(1, TOKENS, WIDTH, generator=generator), torch.randn(1, WIDTH, generator=generator),
    ]


def whole():  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return capture(Denoiser().eval(), tuple(arguments(0)), {}).whole()


def weights(part) -> list[str]:  # type: ignore[no-untyped-def]
    return sorted({str(n.target) for n in part.module.graph.nodes if n.op == "get_attr" and "weight" in str(n.target)})


def test_what_follows_from_the_timestep_is_taken_out() -> None:
    """But not what is as large as a prompt: that is no faster for many timesteps at a time."""
    stage = whole()
    assert stage.timestep == "timestep"
    parts = hoist(stage)
    assert parts is not None
    assert parts.once is not None
    assert parts.timed is not None
    assert weights(parts.once) == ["pooled.weight"]
    assert weights(parts.timed) == ["one.weight", "time.weight", "two.weight"]
    assert weights(parts.each) == ["mix.weight", "prompt.weight"]
    assert [spec.shape for spec in stage_inputs(parts.timed)] == [(STEPS, 1), (1, WIDTH)]
    assert [spec.shape for spec in stage_inputs(parts.each)[-2:]] == [(1, WIDTH)] * 2
    held = dict(parts.timed.module.named_parameters())
    assert held["one.weight"] is stage.module.get_parameter("one.weight"), "weights are the denoiser's own"


@torch.library.custom_op("hybridiff_tests::wave", mutates_args=())
def wave(timestep: Tensor) -> Tensor:
    """An operation that torch knows no rule for."""
    return torch.sin(timestep[:, None] * torch.arange(1, WIDTH + 1) / WIDTH)


@wave.register_fake
def _(timestep: Tensor) -> Tensor:
    return timestep.new_empty(timestep.shape[0], WIDTH)


def test_operations_that_cannot_be_batched_stay_where_they_are() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Linear(WIDTH, WIDTH)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample * self.time(wave(timestep))[:, None]

    stage = capture(Custom().eval(), tuple(arguments(0)[:2]), {}).whole()
    assert hoist(stage) is None


@pytest.fixture(params=["recorded", "called"])
def counted(request):  # type: ignore[no-untyped-def]
    """What runs a stage, and a function that tells how often a right call computed results for many steps."""
    stage = whole()
    parts = hoist(stage)
    assert parts is not None
    assert parts.timed is not None
    calls: list[int] = []

    def timed(*given: Tensor):  # type: ignore[no-untyped-def]
        calls.append(1)
        return parts.timed.module(*given)

    hoisted = replace(Hoisted.build(parts, lambda part: part.module), timed=timed)
    if request.param == "recorded":
        specs = [(spec.shape, getattr(torch, spec.dtype)) for spec in stage_inputs(stage)]
        runs = Replay(hoisted, specs, torch.device("cpu"), record_plainly)
        call = partial(runs, leaves=len(specs))
    else:
        runs = call = Remembered(hoisted)

    def check(given: list[Tensor], moment: Moment | None = None) -> int:
        before = len(calls)
        torch.testing.assert_close(call(*given, moment=moment)[0], stage.module(*given)[0], **CLOSE)
        return len(calls) - before

    return stage, runs, check


def generation(given: list[Tensor], steps: int, seed: int = 0):  # type: ignore[no-untyped-def]
    """Arguments of every step with new latents, and the moments."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.rand(steps, generator=generator)
    for step in range(steps):
        latents = torch.randn(1, TOKENS, WIDTH, generator=generator)
        yield [latents, timesteps[step].expand(1), *given[2:]], Moment(timesteps, step)


def test_once_for_as_many_steps_as_fit(counted) -> None:  # type: ignore[no-untyped-def]
    _, _, check = counted
    computed = [check(*step) for step in generation(arguments(0), STEPS + 10)]
    assert [step for step, count in enumerate(computed) if count] == [0, STEPS]
    assert sum(computed) == 2


def test_both_branches_in_turn_have_a_table_each(counted) -> None:  # type: ignore[no-untyped-def]
    _, _, check = counted
    one, other = arguments(0), arguments(1)
    computed = []
    for (given, moment), (_, _) in zip(generation(one, 6), generation(other, 6)):
        computed.append([check(given, moment), check([*given[:2], *other[2:]], moment)])
    assert computed == [[1, 1]] + [[0, 0]] * 5


def test_it_is_computed_anew_when_something_changed(counted) -> None:  # type: ignore[no-untyped-def]
    stage, runs, check = counted
    given, moment = next(generation(arguments(0), 5))
    assert [check(given, moment) for _ in range(2)] == [1, 0]
    given[3].mul_(2)
    assert check(given, moment) == 1, "the pooled prompt was written to"
    moment.timesteps.mul_(2)
    assert check(given, moment) == 1, "so were the timesteps (and with them the step's own)"
    assert check([given[0], moment.timesteps[1].expand(1), *given[2:]], Moment(moment.timesteps, 1)) == 0
    with torch.no_grad():
        stage.module.one.weight.add_(1.0)
    runs.forget()
    assert check([given[0], moment.timesteps[0].expand(1), *given[2:]], moment) == 1, "a new generation"
    with torch.inference_mode():
        hidden = [given[0], moment.timesteps[0].expand(1), given[2], given[3].clone()]
        assert [check(hidden, moment) for _ in range(3)] == [1, 1, 1], "inference tensors cannot be told"


def test_unknown_timesteps_are_taken_one_by_one(counted) -> None:  # type: ignore[no-untyped-def]
    _, _, check = counted
    for seed in range(3):
        assert check(arguments(seed)) == 1
    given, moment = next(generation(arguments(0), 5))
    assert [check(given, moment), check(arguments(1)), check(given, moment)][::2] == [1, 0]


def test_the_last_steps_of_a_long_generation(counted) -> None:  # type: ignore[no-untyped-def]
    """A generation that starts in the middle of a table needs no other steps than its own."""
    _, _, check = counted
    steps = list(generation(arguments(0), 2 * STEPS + 3))
    assert [check(*step) for step in steps[-4:]] == [1, 1, 0, 0]
