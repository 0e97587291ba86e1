"""Every generated table runs: on real ranks as in the simulator, and wherever its units are placed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybridiff_compiler.ir import FixedSchedule, Partition, Pattern, Plan, RankSpec
from hybridiff_compiler.planner import candidate_partitions, generate_patterns, placements, rank_free
from hybridiff_compiler.runtime.branch_calls import capture_branch
from hybridiff_compiler.runtime.parallelize import parallelize

from .tiny import TinyPipeline, tiny_plan


def generated(pipe: TinyPipeline, gpus: int) -> tuple[Plan, tuple[Partition, ...], tuple[Pattern, ...]]:
    """A two-rank plan to start from, and the partitions and tables of the planner for `gpus` ranks."""
    plan = tiny_plan(pipe)
    layers = capture_branch(pipe.denoiser, plan.model.signature).layers
    partitions = candidate_partitions(layers, [layer.flops + 1 for layer in layers.layers], gpus)
    return plan, partitions, generate_patterns(partitions, gpus)


def plan_over(
    plan: Plan, partitions: tuple[Partition, ...], patterns: tuple[Pattern, ...], steps: list[str], gpus: int
) -> Plan:
    return Plan(
        model=plan.model, ranks=(RankSpec(device="cpu"),) * gpus, partitions=partitions, patterns=patterns,
        exact="branch" if gpus > 1 else "single", schedule=FixedSchedule(steps=tuple(steps)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 8])
def test_ranks_return_what_the_simulator_returns_for_all_generated_tables(
    ranks: int, simulate: Callable[..., Tensor],
) -> None:
    pipe = TinyPipeline()
    base, partitions, patterns = generated(pipe, ranks)
    assert max(pattern.world_size for pattern in patterns) == ranks
    cheap = [pattern.name for pattern in patterns if not pattern.is_exact]
    assert {name.partition(":")[0] for name in cheap} >= {"pipe", "paper", "cond-pipe", "branch-reuse", "reuse"}
    steps = ["branch"]
    for name in cheap:
        steps += [name, name, "branch"]
    plan = plan_over(base, partitions, patterns, steps, ranks)
    with parallelize(pipe, plan, threads=1):
        image = pipe(5, num_inference_steps=len(steps))
    assert torch.isfinite(image).all()
    assert torch.equal(image, simulate(plan, 5, num_inference_steps=len(steps)))


@pytest.mark.parametrize("family", ["pipe", "branch-reuse"])
def test_placement_does_not_change_the_image(simulate: Callable[..., Tensor], family: str) -> None:
    pipe = TinyPipeline()
    base, partitions, patterns = generated(pipe, 3)
    exact = next(pattern for pattern in patterns if pattern.name == "branch")
    pattern = next(pattern for pattern in patterns if pattern.name.startswith(f"{family}:"))
    places = placements(pattern, 3)
    assert len(places) > 1
    assert {rank_free(placed) for placed in places} == {rank_free(pattern)}
    images = []
    for placed in places:
        used = tuple(partition for partition in partitions if partition.name == placed.partition)
        plan = plan_over(base, used, (exact, placed), ["branch", placed.name, placed.name, "branch"], 3)
        images.append(simulate(plan, 2, num_inference_steps=4))
    for image in images[1:]:  # some batch the branches, which rounds differently
        torch.testing.assert_close(image, images[0], rtol=1e-4, atol=1e-4)
