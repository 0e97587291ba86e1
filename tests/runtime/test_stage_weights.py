"""Plans under which every rank holds the parameters of its own stages only."""

from __future__ import annotations

import itertools
import os
import signal
import warnings
from collections.abc import Callable

import pytest
import torch

from hybridiff_compiler.ir import Partition, Pattern, Plan, PlanMismatchError, UsageError, WorkerError
from hybridiff_compiler.planner.memory import plan_memory
from hybridiff_compiler.runtime.branch_calls import capture_branch
from hybridiff_compiler.runtime.intercept import intercept
from hybridiff_compiler.runtime.parallelize import parallelize
from hybridiff_compiler.runtime.segments import SegmentRunner
from hybridiff_compiler.runtime.simulator import Simulator
from hybridiff_compiler.runtime.stage_weights import held_bytes

from .tiny import TinyPipeline, tiny_plan

RELAY = {
    2: "u0@0(u1-) c0@0(c1-) u1@1 c1@1 | cfg",
    3: "u0@0(u1-,u2-) c0@0(c1-,c2-) u1@1(u2-) c1@1(c2-) u2@2 c2@2 | cfg",
}
PIPE = {
    2: "u0@0(u1~) c0@0(c1~) u1@1(u0~) c1@1(c0~) | cfg",
    3: " ".join(
        f"{b}{s}@{s}({','.join(f'{b}{o}~' for o in range(3) if o != s)})" for b in "uc" for s in range(3)
    ) + " | cfg",
}
COND = {2: "c0@0(c1~) c1@1(c0~) | delta", 3: "c0@0(c1~,c2~) c1@1(c0~,c2~) c2@2(c0~,c1~) | delta"}


def stage_plan(pipe: TinyPipeline, ranks: int, steps: str) -> Plan:
    """A plan over one linear split with a stage per rank."""
    base = tiny_plan(pipe, ranks=ranks)
    layers = capture_branch(pipe.denoiser, base.model.signature).layers.names
    bounds = [round(len(layers) * k / ranks) for k in range(ranks + 1)]
    partition = Partition(name="linear", stages=tuple(layers[a:b] for a, b in itertools.pairwise(bounds)))
    tables = {"relay": RELAY[ranks], "pipe": PIPE[ranks], "cond": COND[ranks]}
    patterns = [Pattern.parse(name, table, partition="linear", stages=ranks) for name, table in tables.items()]
    names = steps.split()
    fields = dict(base) | {
        "partitions": (partition,), "patterns": (*patterns, Pattern.parse("reuse", "- | last")), "exact": "relay",
        "weights": "stages", "schedule": {"steps": tuple(names + names[-1:] * (8 - len(names)))},
    }
    fields["schedule"] = base.schedule.model_copy(update=fields["schedule"])
    return Plan(**fields)


def simulated(plan: Plan, prompt: int, **kwargs) -> torch.Tensor:
    pipe = TinyPipeline()
    with intercept(pipe, Simulator(plan, pipe.denoiser)):
        return pipe(prompt, **kwargs)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_images_from_parts(ranks: int) -> None:
    pipe = TinyPipeline()
    whole, plain = held_bytes(pipe.denoiser), pipe(1)
    plan = stage_plan(pipe, ranks, "relay relay pipe cond reuse pipe relay")
    before = {name: tensor.clone() for name, tensor in pipe.denoiser.state_dict().items()}
    with parallelize(pipe, plan, threads=1) as parallel:
        assert torch.equal(pipe(1), simulated(plan, 1))
        assert parallel.executed[:5] == ("relay", "relay", "pipe", "cond", "reuse")
        assert torch.equal(pipe(2, num_inference_steps=5), simulated(plan, 2, num_inference_steps=5))
        assert parallel.executed == ("relay",) * 5
        with warnings.catch_warnings(record=True):
            assert torch.equal(pipe(3, images=2), simulated(plan, 3, images=2))
        with pytest.raises(UsageError, match=r"does not cover this call \(.*and with weights='stages' no rank"):
            pipe(1, size=12)
        with pytest.raises(UsageError, match="no rank has the whole of it"):
            pipe(1, guidance_scale=1.0)
        assert torch.equal(pipe(1), simulated(plan, 1))
        held = parallel.held_bytes()
        layers = capture_branch(pipe.denoiser, plan.model.signature).layers
        predicted = plan_memory(
            layers, plan.model.signature, plan.patterns, plan.partitions, ranks=ranks, parameter_bytes=whole,
            stage_weights=True,
        )
        assert held == pytest.approx([memory.parameters for memory in predicted], rel=0.05)
        assert all(0 < part < 0.75 * whole for part in held)
        assert whole <= sum(held) < 1.3 * whole  # stages may share a parameter
        with pytest.raises(UsageError, match="no rank has the whole of it"), parallel.bypassed():
            pipe(1)
    assert held_bytes(pipe.denoiser) == whole
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.denoiser.state_dict().items())
    assert torch.equal(pipe(1), plain)


def test_relay_is_exact_up_to_batching() -> None:
    pipe = TinyPipeline()
    plan = stage_plan(pipe, 2, "relay")
    assert plan.is_exact
    torch.testing.assert_close(simulated(plan, 1), pipe(1), rtol=1e-4, atol=1e-5)
    branch = tiny_plan(pipe)
    assert torch.equal(simulated(plan, 1), simulated(branch, 1))


def test_a_read_of_nothing_must_be_true() -> None:
    pipe = TinyPipeline()
    plan = stage_plan(pipe, 2, "relay")
    backwards = Pattern.parse("back", "u0@0 u1@1(u0-) c0@0 c1@1(c0-) | cfg", partition="linear", stages=2)
    with pytest.raises(PlanMismatchError, match=r"reads nothing of stage 0.*but it takes"):
        SegmentRunner(pipe.denoiser, plan.model.signature, [backwards], plan.partitions)


def test_the_pipeline_is_whole_again_after_a_failure() -> None:
    pipe = TinyPipeline()
    plain: Callable[..., torch.Tensor] = TinyPipeline()
    with parallelize(pipe, stage_plan(pipe, 2, "relay"), threads=1) as parallel:

        def kill(index: int) -> None:
            if index == 3:
                os.kill(parallel.worker_pids[0], signal.SIGKILL)

        with pytest.raises(WorkerError, match="rank 1 was killed by SIGKILL"):
            pipe(1, callback=kill)
        assert torch.equal(pipe(3), plain(3))
