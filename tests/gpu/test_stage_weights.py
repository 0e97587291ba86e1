"""Two GPUs that hold half of the denoiser each."""

from __future__ import annotations

import torch
from runtime.test_stage_weights import COND, PIPE, RELAY

from hybridiff_compiler.ir import FixedSchedule, Partition, Pattern, Plan
from hybridiff_compiler.runtime.branch_calls import capture_branch
from hybridiff_compiler.runtime.parallelize import parallelize


def test_the_latents_of_the_simulator(model, check) -> None:  # type: ignore[no-untyped-def]
    layers = capture_branch(model.denoiser, model.plan.model.signature).layers.names
    half = len(layers) // 2
    tables = {"relay": RELAY[2], "pipe": PIPE[2], "cond": COND[2]}
    plan = Plan(**(dict(model.plan) | {
        "partitions": (Partition(name="linear", stages=(layers[:half], layers[half:])),), "weights": "stages",
        "patterns": tuple(Pattern.parse(n, t, partition="linear", stages=2) for n, t in tables.items()),
        "exact": "relay", "schedule": FixedSchedule(steps=("relay",) * 3 + ("pipe", "cond", "pipe", "relay", "relay")),
    }))
    expected = model.simulate(plan, "a red apple")
    whole = sum(p.nbytes for p in model.denoiser.parameters())
    before = {name: tensor.clone() for name, tensor in model.denoiser.state_dict().items()}
    with parallelize(model.pipe, plan, backend="eager") as parallel:
        held = parallel.held_bytes()
        assert max(held) < 0.9 * whole
        assert sum(held) < 1.2 * whole
        check(model("a red apple"), expected, "stage weights")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.denoiser.state_dict().items())
    model.denoiser.to("cpu")  # as a model that does not fit a GPU
    try:
        with parallelize(model.pipe, plan, backend="eager"):
            check(model("a red apple"), expected, "stage weights from host memory")
        assert next(model.denoiser.parameters()).device.type == "cpu"
    finally:
        model.denoiser.to("cuda")
