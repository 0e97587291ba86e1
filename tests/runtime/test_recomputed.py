"""Stages that evaluate a cheap layer of another stage themselves return what they return when its value is sent."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel

from hybridiff_compiler.ir import BRANCHES, CallSignature, LeafSpec, Partition, Pattern, Plan, lower
from hybridiff_compiler.runtime.parallelize import parallelize
from hybridiff_compiler.runtime.segments import SegmentRunner
from hybridiff_compiler.runtime.simulator import run_pattern

from .tiny import TinyPipeline, tiny_plan

RELAY = "u0@0(u1~) u1@1 c0@1(c1~) c1@0 | cfg"
SIGNATURE = CallSignature(leaves=(
    LeafSpec(path="encoder_hidden_states", shape=(1, 7, 16), dtype="float32"),
    LeafSpec(path="hidden_states", shape=(1, 4, 8, 8), dtype="float32"),
    LeafSpec(path="pooled_projections", shape=(1, 24), dtype="float32"),
    LeafSpec(path="return_dict", constant="False"),
    LeafSpec(path="timestep", shape=(1,), dtype="float32"),
))


@pytest.fixture(scope="module")
def dit() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=24, out_channels=4,
        pos_embed_max_size=8,
    ).eval()


@pytest.fixture(scope="module")
def inputs() -> dict:
    generator = torch.Generator().manual_seed(1)
    shapes = {leaf.path: leaf.shape for leaf in SIGNATURE.leaves if leaf.shape is not None}
    return {b: {path: torch.randn(shape, generator=generator) for path, shape in shapes.items()} for b in BRANCHES}


def shared_layers(runner: SegmentRunner, first: set[str]) -> tuple[str, ...]:
    """Layers of the first stage that read denoiser inputs alone and that the other stage reads."""
    fed = {name for value in runner.layers.values for name in value.consumers}
    read = {v.producer for v in runner.layers.values if v.producer in first and set(v.consumers) - first}
    return tuple(name for name in runner.layers.names if name in read and name not in fed)


@torch.no_grad()
def test_a_dit_stays_equal_and_sends_less(dit: SD3Transformer2DModel, inputs: dict) -> None:
    bare = SegmentRunner(dit, SIGNATURE, (), ())
    names = bare.layers.names
    front, back = names[: len(names) // 2], names[len(names) // 2 :]
    shared = shared_layers(bare, set(front))
    assert shared  # the embedding of time and prompt, which every block reads
    sent = Partition(name="linear", stages=(front, back))
    again = Partition(name="linear", stages=(front, back), recomputed=((), shared))
    whole = Pattern.parse("branch", "u0@0 c0@1 | cfg")
    relay = Pattern.parse("relay", RELAY, partition="linear", stages=2)
    expected, _ = run_pattern(bare, whole, inputs, {})
    estimates, taken = {}, {}
    for partition in (sent, again):
        runner = SegmentRunner(dit, SIGNATURE, (whole, relay), (partition,))
        estimates[partition], _ = run_pattern(runner, relay, inputs, {})
        last = lower(relay)[-1]
        taken[partition] = {read.value for read in runner.values_read(last)}
    for branch in BRANCHES:
        assert torch.equal(estimates[again][branch], estimates[sent][branch])
        assert torch.equal(estimates[again][branch], expected[branch])
    producer = {value.name: value.producer for value in bare.layers.values}
    assert taken[again] < taken[sent]
    assert {producer[name] for name in taken[sent] - taken[again]} == set(shared)


def test_ranks_return_what_the_simulator_returns_with_and_without(simulate) -> None:
    pipe = TinyPipeline()
    tables = (("branch", "u0@0 c0@1 | cfg", "whole"), ("relay", RELAY, "linear"),
              ("pipe", "u0@0(u1~) c0@0(c1~) u1@1(u0~) c1@1(c0~) | cfg", "linear"))
    plan = tiny_plan(pipe, "branch relay pipe pipe relay branch", tables=tables)
    linear = plan.partitions[1]
    embedding = tuple(name for name in linear.stages[0] if "embed" in name)
    assert embedding
    partition = linear.model_copy(update={"recomputed": ((), embedding)})
    again = Plan(**(dict(plan) | {"partitions": (plan.partitions[0], partition)}))
    with parallelize(pipe, again, threads=1):
        image = pipe(3)
    assert torch.equal(image, simulate(again, 3))
    exact = Plan(**(dict(again) | {"schedule": again.with_steps(("branch", "relay") * 4).schedule}))
    assert torch.equal(simulate(exact, 3), simulate(plan.with_steps(("branch",) * 8), 3))
