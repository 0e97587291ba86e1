"""The distributed runtime returns what the simulator returns, bit for bit, whatever the tables and the schedule."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from hybridiff_compiler.ir import PlanMismatchError, UsageError
from hybridiff_compiler.runtime.parallelize import ParallelPipeline, parallelize
from hybridiff_compiler.runtime.transport import Channel

from .tiny import FOUR_RANKS, ONE_RANK, TWO_RANKS, TinyPipeline, adaptive, tiny_plan

Simulate = Callable[..., torch.Tensor]


def steps_of(text: str) -> tuple[str, ...]:
    names = text.split()
    return tuple(names + names[-1:] * (8 - len(names)))


@pytest.mark.parametrize("name", [name for name, _, _ in TWO_RANKS])
def test_every_pattern_on_two_ranks(
    name: str, pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate
) -> None:
    plan = two_ranks.plan.with_steps(steps_of(f"branch {name} {name} swapped {name} reuse {name} branch"))
    two_ranks.use(plan)
    image = pipe2(3)
    assert two_ranks.executed == plan.schedule.steps
    assert torch.equal(image, simulate(plan, 3))


@pytest.mark.parametrize("name", [name for name, _, _ in FOUR_RANKS])
def test_every_pattern_on_four_ranks(
    name: str, pipe4: TinyPipeline, four_ranks: ParallelPipeline, simulate: Simulate
) -> None:
    plan = four_ranks.plan.with_steps(steps_of(f"branch {name} {name} far {name} reuse {name} branch"))
    four_ranks.use(plan)
    assert torch.equal(pipe4(3), simulate(plan, 3))


def test_random_schedules(
    pipe2: TinyPipeline, two_ranks: ParallelPipeline, pipe4: TinyPipeline, four_ranks: ParallelPipeline,
    simulate: Simulate,
) -> None:
    rng = random.Random(11)
    for pipe, parallel, tables, runs in ((pipe2, two_ranks, TWO_RANKS, 40), (pipe4, four_ranks, FOUR_RANKS, 15)):
        names = [name for name, _, _ in tables]
        for run in range(runs):
            plan = parallel.plan.with_steps(("branch", *rng.choices(names, k=7)))
            parallel.use(plan)
            assert torch.equal(pipe(run), simulate(plan, run)), str(plan.schedule)


@pytest.mark.parametrize("lag", [1, 2, 3])
@pytest.mark.parametrize("window", ["paper", "pipe", "reuse", "cond-linear"])
def test_adaptive_schedules(
    lag: int, window: str, pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate
) -> None:
    plan = adaptive(two_ranks.plan, window=window, lag=lag)
    two_ranks.use(plan)
    for prompt in range(3):
        image = pipe2(prompt)
        assert two_ranks.executed.count(window) == 2
        assert torch.equal(image, simulate(plan, prompt))


def test_exact_patterns_equal_the_denoiser_branch_by_branch(
    pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate
) -> None:
    two_ranks.use(two_ranks.plan.with_steps(("branch",) * 8))
    image = pipe2(5)
    assert torch.equal(image, simulate(two_ranks.plan.with_steps(("swapped",) * 8), 5))
    assert torch.allclose(image, TinyPipeline()(5), atol=1e-5)


def sent(parallel: ParallelPipeline, run: Callable[[], object]) -> dict[Channel, tuple[int, int]]:
    transport = parallel.transport
    assert transport is not None
    messages, sizes = transport.sent_messages.copy(), transport.sent_bytes.copy()
    run()
    return {c: (transport.sent_messages[c] - messages[c], transport.sent_bytes[c] - sizes[c]) for c in Channel}


def test_constants_travel_once_per_generation(pipe2: TinyPipeline, two_ranks: ParallelPipeline) -> None:
    two_ranks.use(two_ranks.plan.with_steps(("branch",) * 8))
    sizes = []

    def measure(_: int) -> None:
        assert two_ranks.transport is not None
        sizes.append(two_ranks.transport.sent_bytes[Channel.ORDERS])

    measure(-1)
    traffic = sent(two_ranks, lambda: pipe2(9, callback=measure))
    assert traffic[Channel.ORDERS][0] == 8
    assert traffic[Channel.VALUES] == (0, 0)
    steps = [after - before for before, after in pairwise(sizes)]
    assert steps[0] - steps[1] == 192 + 64  # the cond embeddings: 160 bytes, and 8 timesteps, aligned
    assert set(steps[1:]) == {steps[1]}
    assert steps[1] < 2000  # latents 1024, timestep 64, header


def test_steps_without_work_for_a_worker_send_it_nothing(
    pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate
) -> None:
    plan = two_ranks.plan.with_steps(steps_of("branch reuse single reuse single single branch"))
    two_ranks.use(plan)
    traffic = sent(two_ranks, lambda: pipe2(2))
    assert traffic[Channel.ORDERS][0] == 3
    assert torch.equal(pipe2(2), simulate(plan, 2))


def test_more_missed_steps_than_one_order_holds(
    pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate
) -> None:
    names = ("branch", *["single"] * 150, "paper", "pipe")
    plan = two_ranks.plan.with_steps(names)
    two_ranks.use(plan)
    image = pipe2(2, num_inference_steps=len(names))
    assert torch.equal(image, simulate(plan, 2, num_inference_steps=len(names)))


def test_one_rank_needs_no_worker(simulate: Simulate) -> None:
    pipe = TinyPipeline()
    plan = tiny_plan(pipe, "single reuse single", ranks=1, tables=ONE_RANK, exact="single")
    with parallelize(pipe, plan) as parallel:
        assert parallel.worker_pids == ()
        assert torch.equal(pipe(1), simulate(plan, 1))


def test_other_calls_still_give_the_right_image(
    pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate
) -> None:
    plan = two_ranks.plan.with_steps(steps_of("branch paper"))
    two_ranks.use(plan)
    plain = TinyPipeline()
    with pytest.warns(UserWarning, match="does not cover this call"):
        larger = pipe2(1, size=16)
    assert torch.equal(larger, plain(1, size=16))
    assert torch.equal(pipe2(1, guidance_scale=1.0), plain(1, guidance_scale=1.0))
    with pytest.warns(UserWarning, match="does not cover this call"):
        longer = pipe2(1, tokens=9)
    assert torch.equal(longer, plain(1, tokens=9))
    with pytest.warns(UserWarning, match="made for 8 steps, got 5"):
        fewer = pipe2(1, num_inference_steps=5)
    assert two_ranks.executed == ("branch",) * 5
    assert torch.equal(fewer, simulate(plan, 1, num_inference_steps=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each is said once
        pipe2(1, size=16)
        pipe2(1, num_inference_steps=5)
    assert torch.equal(pipe2(1), simulate(plan, 1))


@pytest.mark.parametrize("steps", [5, 12])
def test_plans_of_other_lengths(
    steps: int, pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate
) -> None:
    """The ranks were started for 8 steps; a plan of their tables may have fewer or more."""
    before = two_ranks.plan
    plan = before.with_steps(("branch", *["paper"] * (steps - 1)))
    two_ranks.use(plan)
    try:
        assert torch.equal(pipe2(1, num_inference_steps=steps), simulate(plan, 1, num_inference_steps=steps))
    finally:
        two_ranks.use(before)


def test_interrupted_generation_then_a_normal_one(
    pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate
) -> None:
    class Interrupt(Exception):
        pass

    def interrupt_at(step: int) -> Callable[[int], None]:
        def callback(index: int) -> None:
            if index == step:
                raise Interrupt

        return callback

    for name in ("paper", "pipe", "moved", "fresh-linear"):
        plan = two_ranks.plan.with_steps(steps_of(f"branch {name}"))
        two_ranks.use(plan)
        for step in (0, 3, 7):
            with pytest.raises(Interrupt):
                pipe2(0, callback=interrupt_at(step))
            assert torch.equal(pipe2(step), simulate(plan, step))


def test_inference_mode_and_back(pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate) -> None:
    plan = two_ranks.plan.with_steps(steps_of("branch pipe remote"))
    two_ranks.use(plan)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            image = pipe2(4)
        assert torch.equal(image, simulate(plan, 4))


def test_changed_weights_are_noticed() -> None:
    pipe = TinyPipeline()
    with parallelize(pipe, tiny_plan(pipe, "single", ranks=1, tables=ONE_RANK, exact="single"), threads=1):
        with torch.no_grad():
            pipe.denoiser.head.weight.mul_(2)
        with pytest.warns(UserWarning, match="weights or modules changed"):
            image = pipe(1)
    assert torch.equal(image, pipe(1))


def test_use_refuses_foreign_tables(two_ranks: ParallelPipeline, four_ranks: ParallelPipeline) -> None:
    with pytest.raises(PlanMismatchError, match="other ranks"):
        two_ranks.use(four_ranks.plan)
    fields = dict(two_ranks.plan)
    renamed = fields["patterns"][4].model_copy(update={"name": "new"})
    with pytest.raises(PlanMismatchError, match="not started with tables"):
        two_ranks.use(type(two_ranks.plan)(**(fields | {"patterns": (*fields["patterns"], renamed)})))


def test_another_plan_waits_for_the_next_generation(
    pipe2: TinyPipeline, two_ranks: ParallelPipeline, simulate: Simulate
) -> None:
    plan, other = (two_ranks.plan.with_steps(steps_of(text)) for text in ("branch paper", "branch reuse"))
    two_ranks.use(plan)
    image = pipe2(1, callback=lambda step: two_ranks.use(other))
    assert two_ranks.executed == plan.schedule.steps
    assert torch.equal(image, simulate(plan, 1))
    assert torch.equal(pipe2(1), simulate(other, 1))


def test_what_graphs_do_not_follow_is_left_to_the_denoiser(
    pipe2: TinyPipeline, two_ranks: ParallelPipeline
) -> None:
    two_ranks.use(two_ranks.plan.with_steps(steps_of("branch reuse")))
    plain = TinyPipeline()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match="autocast is on"):
            image = pipe2(1)
        assert torch.equal(image, plain(1))


def test_gradients_come_from_the_denoiser(pipe2: TinyPipeline, two_ranks: ParallelPipeline) -> None:
    two_ranks.use(two_ranks.plan.with_steps(steps_of("branch reuse")))
    latents, prompt = torch.randn(2, 1, 4, 8, 8, requires_grad=True), torch.randn(2, 5, 8)
    estimates = []
    for pipe in (pipe2, TinyPipeline()):
        pipe.scheduler.set_timesteps(8)
        for step in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                (estimate,) = pipe.denoiser(
                    torch.cat([latents[step]] * 2), pipe.scheduler.timesteps[step], prompt
                )
            assert estimate.requires_grad
        estimates.append(estimate)
    assert torch.equal(*estimates)


def test_a_pipeline_that_shares_the_denoiser_does_not_go_on_with_a_generation(
    pipe2: TinyPipeline, two_ranks: ParallelPipeline
) -> None:
    """It has a scheduler of its own, whose generations nobody sees begin."""
    two_ranks.use(two_ranks.plan.with_steps(steps_of("branch reuse")))
    other, plain = TinyPipeline(), TinyPipeline()
    other.denoiser = pipe2.denoiser

    class Interrupt(Exception):
        pass

    def interrupt(step: int) -> None:
        if step == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        pipe2(1, callback=interrupt)
    with pytest.warns(UserWarning, match="no longer those of the pipeline's scheduler"):
        image = other(2)
    assert torch.equal(image, plain(2))


def test_the_default_device_is_not_the_messages_(simulate: Simulate) -> None:
    pipe = TinyPipeline()
    plan = tiny_plan(pipe, "branch paper")
    with torch.device("meta"):
        parallel = parallelize(pipe, plan, threads=1)
    with parallel:
        assert torch.equal(pipe(1), simulate(plan, 1))


def test_wrong_plans_and_arguments_are_refused_before_anything_starts(
    pipe2: TinyPipeline, two_ranks: ParallelPipeline
) -> None:
    plan = two_ranks.plan
    pipe = TinyPipeline()
    with pytest.raises(UsageError, match="by a plan already"):
        parallelize(pipe2, plan)
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"denoiser": "OtherNet"})})
    with pytest.raises(PlanMismatchError, match="made for a OtherNet"):
        parallelize(pipe, other)
    with pytest.raises(PlanMismatchError, match="got devices"):
        parallelize(pipe, plan, devices=["cpu"])
    with pytest.raises(UsageError, match="threads"):
        parallelize(pipe, plan, threads=0)
    with pytest.raises(UsageError, match="timeout_s"):
        parallelize(pipe, plan, timeout_s=0)
    assert "forward" not in pipe.denoiser.__dict__


def test_a_plan_for_another_graph_is_refused(two_ranks: ParallelPipeline) -> None:
    plan = two_ranks.plan
    pipe = TinyPipeline()
    pipe.denoiser.blocks = pipe.denoiser.blocks[:4]
    pipes_before = torch.get_num_threads()
    with pytest.raises(PlanMismatchError, match="layer graph"):
        parallelize(pipe, plan)
    assert torch.get_num_threads() == pipes_before
    assert pipe(0).shape == (1, 4, 8, 8)
