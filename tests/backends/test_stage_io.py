"""What stages take and return, and the digest that artifacts are found by."""

from __future__ import annotations

import copy

import pytest
import torch
from bundle.small import PlainPipeline, small_plan

from hybridiff_compiler.backends.stage_io import (
    TensorSpec,
    fit_arguments,
    stage_digest,
    stage_inputs,
    stage_outputs,
    stage_weights,
    weights_digest,
)
from hybridiff_compiler.backends.target import cpu_arch
from hybridiff_compiler.bundle.writing import distinct_stages
from hybridiff_compiler.capture import capture
from hybridiff_compiler.ir import InputError
from hybridiff_compiler.runtime.branch_calls import example_call
from hybridiff_compiler.runtime.segments import SegmentRunner


def test_specs_follow_the_calling_convention(small_stages, arguments):
    for stage in small_stages:
        assert [spec.name for spec in stage_inputs(stage)] == [*stage.inputs, *stage.values_in]
        outputs = stage.module(*arguments(stage))
        specs = stage_outputs(stage)
        assert [(tuple(o.shape), f"torch.{s.dtype}") for o, s in zip(outputs, specs, strict=True)] == [
            (s.shape, str(o.dtype)) for o, s in zip(outputs, specs)
        ]


def test_digest_is_of_the_graph_not_of_the_weights(small_stages):
    other = PlainPipeline(seed=3)
    again = [build.stage for build in distinct_stages(small_plan(other), other.denoiser)]
    for mine, theirs in zip(small_stages, again):
        assert stage_digest(mine) == stage_digest(theirs)
        assert weights_digest(stage_weights(mine)) != weights_digest(stage_weights(theirs))
        assert stage_weights(theirs).keys() == stage_weights(mine).keys()
    assert stage_weights(again[0])["tail.weight"] is other.denoiser.tail.weight


def test_digest_tells_graphs_apart():
    pipe = PlainPipeline()
    plan = small_plan(pipe)
    runner = SegmentRunner(pipe.denoiser, plan.model.signature, plan.patterns, plan.partitions)
    names = runner.layers.names
    variants = [
        runner.captured(1).whole(), runner.captured(2).whole(), runner.captured(1).whole(runner.taps[:1]),
        runner.captured(1).extract(names[2:]), runner.captured(1).extract(names[3:]),
    ]
    assert len({stage_digest(stage) for stage in variants}) == len(variants)


def test_digest_ignores_the_device():
    digests = set()
    for device in ("cpu", "meta"):
        pipe = PlainPipeline()
        plan = small_plan(pipe)
        pipe.denoiser.to(device)
        runner = SegmentRunner(pipe.denoiser, plan.model.signature, plan.patterns, plan.partitions)
        digests.add(stage_digest(runner.captured(1).whole()))
    assert len(digests) == 1


def test_a_bundled_model_is_the_same_on_every_device(bench):
    """Bundles are compiled on one machine and run on another: neither plan nor artifact may depend on the device."""
    captures = [
        capture(denoiser, (), example_call(bench.signature, device))
        for denoiser, device in ((bench.denoiser, "cpu"), (copy.deepcopy(bench.denoiser).to("meta"), "meta"))
    ]
    assert len({captured.layers.fingerprint() for captured in captures}) == 1
    assert len({stage_digest(captured.whole()) for captured in captures}) == 1


def test_arguments_are_fitted_or_refused():
    specs = [TensorSpec(name="latents", shape=(2, 3), dtype="float32")]
    right = torch.arange(6.0).reshape(2, 3)
    assert fit_arguments([right], specs)[0] is right
    (strided,) = fit_arguments([right.T.contiguous().T], specs)
    assert strided.is_contiguous()
    assert torch.equal(strided, right)
    crooked = torch.cat([torch.zeros(1), right.flatten()])[1:].reshape(2, 3)
    (aligned,) = fit_arguments([crooked], specs)
    assert aligned.data_ptr() % 16 == 0
    assert torch.equal(aligned, right)
    for wrong in ([], [right, right]):
        with pytest.raises(InputError, match="takes 1 arguments"):
            fit_arguments(wrong, specs)
    for wrong in (right.T, right.double(), right[None]):
        with pytest.raises(InputError, match=r"compiled for latents: float32\[2,3\]"):
            fit_arguments([wrong], specs)


def test_the_architecture_is_one_word():
    assert cpu_arch() == cpu_arch()
    assert len(cpu_arch().split()) == 1
