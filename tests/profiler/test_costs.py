"""Layer times in place, the fit to stages, and the loop between stages and partitions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hybridiff_compiler as hc
from hybridiff_compiler.ir import InputError, Partition, Pattern, Profile, UsageError
from hybridiff_compiler.profiler import costs as costs_module
from hybridiff_compiler.profiler.costs import StageTime, distinct_segments, fit_to_stages, layers_of, stage_distance
from hybridiff_compiler.profiler.marks import MarkedWhole
from hybridiff_compiler.profiler.precompile import Helpers, Recipe
from hybridiff_compiler.quality.denoisers import DENOISERS, random_denoiser
from hybridiff_compiler.runtime.segments import SegmentRunner

NAMES = tuple("abcdefgh")
TINY = [name for name in DENOISERS if name.endswith("-tiny")]


@given(
    st.lists(st.floats(1e-4, 1e-2), min_size=8, max_size=8), st.floats(0.7, 1.4), st.floats(0.7, 1.4),
    st.integers(1, 7),
)
def test_layers_are_fitted_to_the_stages(seconds, front, back, cut):
    """Two stages that cover everything: their layers are scaled alike, and sum up to what was measured."""
    stages = [
        StageTime(frozenset(NAMES[:cut]), front * sum(seconds[:cut])),
        StageTime(frozenset(NAMES[cut:]), back * sum(seconds[cut:])),
    ]
    fitted = np.array(fit_to_stages(NAMES, seconds, stages)) / seconds
    assert fitted[:cut] == pytest.approx([front] * cut, rel=0.03)
    assert fitted[cut:] == pytest.approx([back] * (8 - cut), rel=0.03)
    assert stage_distance(NAMES, fitted * seconds, stages) < 0.03


def test_a_disturbed_stage_is_trusted_less():
    seconds = [1.0] * 8
    calm = StageTime(frozenset(NAMES[:4]), 5.0)
    wild = StageTime(frozenset(NAMES[:4]), 5.0, spread=2.0)
    assert sum(fit_to_stages(NAMES, seconds, [calm])[:4]) == pytest.approx(5.0, rel=0.02)
    assert sum(fit_to_stages(NAMES, seconds, [wild])[:4]) < 4.5


@pytest.fixture(scope="module")
def tiny():
    return random_denoiser("sd3-tiny", device="cpu")


@pytest.fixture(scope="module")
def runner(tiny):
    from hybridiff_compiler.capture import flatten_call

    signature, leaves = flatten_call(tiny.denoiser, (), tiny.call)
    return SegmentRunner(tiny.denoiser, signature, (), ()), leaves


def test_layers_that_nobody_waits_for_are_no_part_of_a_stage(tiny, runner):
    """The front of a chain whose middle is reused is not computed, and a value that is passed on is."""
    bare = runner[0]
    names = bare.layers.names
    blocks = [name for name in names if name.startswith("transformer_blocks")]
    inner = tuple(blocks[1:3])
    partition = Partition(name="split", stages=(inner, tuple(name for name in names if name not in inner)))

    def live(table):
        pattern = Pattern.parse("p", table, partition="split", stages=2)
        cut = SegmentRunner(
            tiny.denoiser, bare.signature, [pattern], [partition], captured={1: bare.captured(1)}
        )
        outer = next(s for s in distinct_segments([pattern]).values() if s.stages == (1,))
        return layers_of(cut, outer, {"split": partition})

    assert blocks[0] not in live("u1@0(u0~) c1@1(c0~) | cfg")
    assert blocks[0] in live("c0@0(c1~) c1@1(c0~) | delta")
    assert blocks[3] in live("u1@0(u0~) c1@1(c0~) | cfg")


def test_marks_split_the_time_of_one_evaluation(runner):
    whole = MarkedWhole.build(runner[0].captured(1), runner[1], "eager")
    timings = whole.times(3)
    assert whole.layers == runner[0].layers.names
    assert len(timings) == len(whole.layers)
    assert all(timing.median >= 0 and timing.spread >= 0 for timing in timings)
    assert sum(timing.median for timing in timings) > 0


@pytest.mark.slow
def test_marks_survive_compilation(runner):
    """Every mark is reached once per evaluation, in order, and the compiled whole with marks computes the same."""
    captured, leaves = runner[0].captured(1), runner[1]
    whole = MarkedWhole.build(captured, leaves, "inductor")
    gaps = whole.sample()
    assert len(gaps) == len(captured.layers.names)
    assert all(gap >= 0 for gap in gaps)
    assert sum(gaps) > 0


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_can_be_called(name):
    built = random_denoiser(name, device="cpu", seed=1)
    with torch.no_grad():
        estimate = built.denoiser(**built.call)[0]
    assert torch.isfinite(estimate).all()


def test_architectures_refuse_what_is_not_there():
    with pytest.raises(UsageError, match="unknown architecture 'sd9'"):
        random_denoiser("sd9", device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            random_denoiser("sdxl", device="cuda")


@pytest.fixture(scope="module")
def profile(tiny):
    return hc.profile_costs(
        tiny.denoiser, call=tiny.call, name="sd3-tiny", random_weights=True, threads=1, num_inference_steps=8,
        links=("cpu", "cpu"),
    )


def test_a_profile_of_costs_is_complete(profile, tmp_path):
    timing = profile.costs.timing
    assert timing.method == "wall"
    assert 1 <= timing.rounds <= 3
    assert timing.settled is not None
    assert timing.fitted_residual <= timing.stage_residual + 0.05
    for batch, seconds in profile.costs.layers.items():
        assert len(seconds) == len(timing.spread[batch]) == len(profile.graph.layers)
        assert sum(seconds) == pytest.approx(timing.whole_s[batch])
        assert timing.whole_s[batch] == profile.costs.stage_seconds("whole", (0,), batch)
    assert {cost.partition for cost in profile.costs.stages} == {"whole", *(p.name for p in profile.partitions)}
    assert {(link.source, link.target) for link in profile.costs.links} == {(0, 1), (1, 0)}
    assert profile.costs.transport == "gloo"
    assert profile.provenance.random_weights
    assert Profile.load(profile.save(tmp_path / "costs.json")) == profile


def test_a_profile_of_costs_plans_exactly(profile):
    plan = hc.plan(profile, gpus=2, policy="exact")
    assert plan.is_exact
    assert plan.predictions.latency_s > 0


def test_costs_of_a_pipeline(bench):
    measured = hc.profile_costs(bench.pipe, name=bench.name, num_inference_steps=3, quick=True, threads=1,
                                **bench.options)
    assert measured.model.signature == bench.signature
    assert measured.graph.fingerprint() == bench.layers.fingerprint()
    assert measured.costs.step_overhead_s > 0
    assert not measured.errors


def test_partitions_are_solved_for_until_they_stay(tiny, monkeypatch):
    """Stage times that contradict the layers move the cut; the same stages are not timed twice."""
    timed = []

    def fake(runner, inputs, segments, **_):
        found = []
        for segment in segments:
            partition = runner._partitions[segment.partition]
            names = [name for stage in segment.stages for name in partition.stages[stage]]
            timed.append((tuple(names), len(segment.branches)))
            # the later half of the layers takes three times what the layers say
            order = runner.layers.names
            seconds = sum(3.0 if order.index(name) >= len(order) // 2 else 1.0 for name in names)
            found.append(costs_module.StageCost(
                partition=segment.partition, stages=segment.stages, batch=len(segment.branches),
                seconds=seconds * len(segment.branches),
            ))
        return tuple(found)

    monkeypatch.setattr("hybridiff_compiler.profiler.settling.measure_segments", fake)
    measured = hc.profile_costs(tiny.denoiser, call=tiny.call, threads=1)
    assert len(timed) == len(set(timed))
    assert measured.costs.timing.rounds > 1
    linear = next(p for p in measured.partitions if p.name == "linear")
    assert len(linear.stages[0]) > len(linear.stages[1])


def test_without_a_denoisers_call_there_is_nothing_to_measure(tiny):
    with pytest.raises(UsageError, match="without an example call"):
        hc.profile_costs(tiny.denoiser)


def test_helpers_build_graphs_and_end(runner):
    from hybridiff_compiler.planner import candidate_partitions, measured_patterns
    graph = runner[0].layers
    partitions = candidate_partitions(graph, [1.0] * len(graph.layers), (2,))
    patterns = measured_patterns(partitions, (2,))
    recipe = Recipe("hybridiff_compiler.quality.denoisers:build_denoiser", {"name": "sd3-tiny", "device": "cpu"})
    with Helpers(recipe, 1, backend="eager") as helpers:
        helpers.start(runner[0].signature, partitions, patterns, list(distinct_segments(patterns).values()))
        helpers.wait()
        (process,) = helpers._helpers
        assert process.poll() is None
    assert process.poll() is not None


def test_a_helper_that_fails_is_no_failure(runner):
    with Helpers(Recipe("hybridiff_compiler.quality.denoisers:nothing"), 1, backend="eager") as helpers:
        helpers.start(runner[0].signature, (), (), ())
        helpers.wait()
