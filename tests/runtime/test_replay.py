"""Static buffers and replay, with a plain call in place of a CUDA graph."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from hybridiff_compiler.backends.cuda_graph import Replay, record_plainly
from hybridiff_compiler.ir import UsageError
from hybridiff_compiler.runtime import orders
from hybridiff_compiler.runtime.intercept import intercept
from hybridiff_compiler.runtime.parallelize import ParallelPipeline, assign_devices
from hybridiff_compiler.runtime.segments import SegmentRunner
from hybridiff_compiler.runtime.simulator import Simulator
from hybridiff_compiler.runtime.transport import Channel, Transport

from .tiny import FOUR_RANKS, TWO_RANKS, TinyPipeline, tiny_plan

Simulate = Callable[..., torch.Tensor]


def test_replay_copies_arguments_in_and_overwrites_its_results() -> None:
    replay = Replay(lambda a, b: (a + b, a), [((2,), torch.float32)] * 2, torch.device("cpu"), record_plainly)
    first, same = replay(torch.ones(2), torch.ones(2))
    assert first.tolist() == [2, 2]
    again, _ = replay(torch.full((2,), 5.0, dtype=torch.float64), torch.ones(2))
    assert again is first
    assert first.tolist() == [6, 6]
    assert same.tolist() == [5, 5]


def test_leaves_that_did_not_change_are_not_copied_again() -> None:
    replay = Replay(lambda a, b: (a + b,), [((2,), torch.float32)] * 2, torch.device("cpu"), record_plainly)
    leaf, value = torch.ones(2), torch.ones(2)
    assert replay(leaf, value, leaves=1)[0].tolist() == [2, 2]
    replay._inputs[0].fill_(7)
    replay._inputs[1].fill_(7)
    assert replay(leaf, value, leaves=1)[0].tolist() == [8, 8], "values are always copied"
    leaf.add_(1)
    assert replay(leaf, value, leaves=1)[0].tolist() == [3, 3], "written to"
    assert replay(leaf[:1].expand(2), value, leaves=1)[0].tolist() == [3, 3]
    for number in range(3):  # new tensors never have the address of the one that was copied last
        assert replay(torch.full((2,), float(number)), value, leaves=1)[0].tolist() == [number + 1] * 2
    with torch.inference_mode():
        hidden = torch.zeros(2)
        replay(hidden, value, leaves=1)
        hidden.add_(4)
        assert replay(hidden, value, leaves=1)[0].tolist() == [5, 5], "inference tensors count no versions"


def test_a_step_copies_only_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = TinyPipeline()
    plan = tiny_plan(pipe).with_steps(("branch",) * 8)
    simulator = Simulator(plan, pipe.denoiser, recorder=record_plainly)
    copied: list[int] = []
    original = torch.Tensor.copy_

    def copy_(tensor: torch.Tensor, *arguments, **options):  # type: ignore[no-untyped-def]
        copied[-1] += sum(tensor is buffer for replay in replays for buffer in replay._inputs)
        return original(tensor, *arguments, **options)

    step, replays = simulator.step, []

    def counted(call):  # type: ignore[no-untyped-def]
        copied.append(0)
        pair = step(call)
        replays[:] = [graph.call for graph in simulator._runners[1]._graphs.values()]
        return pair

    simulator.step = counted  # type: ignore[method-assign]
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    with intercept(pipe, simulator):
        pipe(1)
    # One graph runs both branches in turn here; each has latents and a prompt of its own, the timestep is shared.
    assert copied[2:] == [5] * 6, copied


@pytest.mark.parametrize(("tables", "ranks"), [(TWO_RANKS, 2), (FOUR_RANKS, 4)])
def test_replayed_graphs_compute_the_same(tables: tuple, ranks: int, simulate: Simulate) -> None:
    pipe = TinyPipeline()
    plan = tiny_plan(pipe, ranks=ranks, tables=tables)
    rng, runners = random.Random(5), {}  # type: ignore[var-annotated]
    for name in [name for name, _, _ in tables]:
        steps = ("branch", name, name, *rng.choices([n for n, _, _ in tables], k=3), name, "branch")
        chosen = plan.with_steps(steps)
        simulator = Simulator(chosen, pipe.denoiser, runners=runners, recorder=record_plainly)
        with intercept(pipe, simulator):
            assert torch.equal(pipe(2), simulate(chosen, 2)), steps
    assert isinstance(runners[1], SegmentRunner)


def test_estimates_survive_the_next_step() -> None:
    pipe = TinyPipeline()
    plan = tiny_plan(pipe)
    simulator = Simulator(plan, pipe.denoiser, recorder=record_plainly)
    seen: list[torch.Tensor] = []
    step = simulator.step

    def recorded(call):  # type: ignore[no-untyped-def]
        pair = step(call)
        seen.extend(pair.values())
        copies.extend(estimate.clone() for estimate in pair.values())
        return pair

    copies: list[torch.Tensor] = []
    simulator.step = recorded  # type: ignore[method-assign]
    with intercept(pipe, simulator):
        pipe(1)
    assert len(seen) == 16
    assert all(torch.equal(estimate, copy) for estimate, copy in zip(seen, copies))


@pytest.mark.parametrize("name", [name for name, _, _ in TWO_RANKS])
def test_estimates_may_be_asked_for_late(
    name: str, pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transport, "posts_early", False)  # as between GPUs
    plan = two_ranks.plan.with_steps(("branch", name, name, "swapped", name, "reuse", name, "branch"))
    two_ranks.use(plan)
    assert torch.equal(pipe2(4), simulate(plan, 4))


@pytest.mark.parametrize("name", ["branch", "paper", "moved", "pipe"])
def test_inputs_may_travel_apart_from_their_order(
    name: str, pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "travels_apart", lambda tensor: tensor.dim() > 0)  # as tensors on a GPU do
    plan = two_ranks.plan.with_steps(("branch", name, name, "swapped", name, "reuse", name, "branch"))
    two_ranks.use(plan)
    assert two_ranks.transport is not None
    before = two_ranks.transport.sent_messages[Channel.INPUTS]
    for prompt in (4, 5):
        assert torch.equal(pipe2(prompt), simulate(plan, prompt))
    assert two_ranks.transport.sent_messages[Channel.INPUTS] > before


def test_stage_times_of_all_ranks(pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate) -> None:
    plan = two_ranks.plan.with_steps(("branch",) * 8)
    two_ranks.use(plan)
    expected = simulate(plan, 6)
    for _ in range(2):
        assert all(seconds > 0 for seconds in two_ranks.stage_seconds("paper"))
        assert two_ranks.stage_seconds("single")[1] == 0
        assert torch.equal(pipe2(6), expected)


def test_gpu_plans_need_the_gpus() -> None:
    pipe = TinyPipeline()
    plan = tiny_plan(pipe)
    fields = dict(plan) | {"ranks": tuple(rank.model_copy(update={"device": "cuda"}) for rank in plan.ranks)}
    if torch.cuda.device_count() < 2:
        with pytest.raises(UsageError, match="2 GPUs, this machine has"):
            assign_devices(type(plan)(**fields), pipe.denoiser, None)
