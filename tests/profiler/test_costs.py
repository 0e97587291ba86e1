"""Layer times in place, the fit to stages, and the loop between stages and partitions."""

import pickle
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hybridiff_compiler as hc
from hybridiff_compiler.backends.merging import join_parameters
from hybridiff_compiler.capture import capture
from hybridiff_compiler.ir import InputError, Partition, Pattern, Profile, UsageError
from hybridiff_compiler.planner import candidate_partitions, measured_patterns
from hybridiff_compiler.profiler.costs import StageTime, fit_to_stages, stage_distance
from hybridiff_compiler.profiler.jobs import GraphBuilder, Job, distinct_segments, segment_of
from hybridiff_compiler.profiler.marks import MarkedWhole
from hybridiff_compiler.profiler.timers import ProcessTimers, share_tensors
from hybridiff_compiler.profiler.timing import Timing
from hybridiff_compiler.quality.denoisers import DENOISERS, random_denoiser
from hybridiff_compiler.report.describe_costs import describe_timing
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
        StageTime(dict.fromkeys(NAMES[:cut], 1.0), front * sum(seconds[:cut])),
        StageTime(dict.fromkeys(NAMES[cut:], 1.0), back * sum(seconds[cut:])),
    ]
    fitted = np.array(fit_to_stages(NAMES, seconds, stages)) / seconds
    assert fitted[:cut] == pytest.approx([front] * cut, rel=0.03)
    assert fitted[cut:] == pytest.approx([back] * (8 - cut), rel=0.03)
    assert stage_distance(NAMES, fitted * seconds, stages) < 0.03


def test_a_disturbed_stage_is_trusted_less():
    seconds = [1.0] * 8
    calm = StageTime(dict.fromkeys(NAMES[:4], 1.0), 5.0)
    wild = StageTime(dict.fromkeys(NAMES[:4], 1.0), 5.0, spread=2.0)
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
        taps = [name for _, name in cut.values_written(outer)]
        return bare.captured(1).shares(partition.stages[1], taps)

    reused, passed_on = live("u1@0(u0~) c1@1(c0~) | cfg"), live("c0@0(c1~) c1@1(c0~) | delta")
    assert blocks[0] not in reused
    assert passed_on[blocks[0]] == reused[blocks[3]] == 1.0


def test_of_a_layer_that_only_shares_something_cheap_little_counts():
    """PixArt's first block prepares the mask for all others: reusing the block's output leaves that, not the block."""
    built = random_denoiser("pixart-tiny", device="cpu")
    captured = capture(built.denoiser, (), built.call)
    names = captured.layers.names
    first, *_, last = (name for name in names if name.startswith("transformer_blocks"))
    shares = captured.shares((*names[: names.index(first) + 1], *names[names.index(last):]))
    assert shares[last] == 1.0
    assert shares.get(first, 0.0) < 0.1


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

    def fake(self, job):
        partition = next((p for p in job.partitions if p.name == segment_of(job).partition), None)
        order = capture(tiny.denoiser, (), tiny.call).layers.names
        names = order if partition is None else [n for stage in segment_of(job).stages for n in partition.stages[stage]]
        timed.append((tuple(names), job.batch))
        # the later half of the layers takes three times what the layers say
        seconds = sum(3.0 if order.index(name) >= len(order) // 2 else 1.0 for name in names)
        return lambda: (seconds * job.batch,)

    monkeypatch.setattr(GraphBuilder, "sampler", fake)
    measured = hc.profile_costs(tiny.denoiser, call=tiny.call, threads=1)
    assert len(timed) == len(set(timed))
    assert measured.costs.timing.rounds > 1
    linear = next(p for p in measured.partitions if p.name == "linear")
    assert len(linear.stages[0]) > len(linear.stages[1])


def test_without_a_denoisers_call_there_is_nothing_to_measure(tiny):
    with pytest.raises(UsageError, match="without an example call"):
        hc.profile_costs(tiny.denoiser)


def jobs_of(graph):
    partitions = candidate_partitions(graph, [1.0] * len(graph.layers), (2,))
    patterns = measured_patterns(partitions, (2,))
    return {
        f"job {number}": Job(kind="segment", backend="eager", partitions=partitions, patterns=patterns, segment=number)
        for number in range(3)
    } | {"layers": Job(kind="layers", backend="eager")}


def test_processes_build_and_time_graphs_on_shared_weights(tiny, runner):
    bare, leaves = runner
    inputs = {"cond": leaves, "uncond": leaves}
    notes = []
    timers = ProcessTimers(tiny.denoiser, bare.signature, inputs, count=2, threads=1, on_note=notes.append)
    try:
        timers.start(jobs_of(bare.layers))
        times = timers.finish(2, time.monotonic() + 300, lambda done, total: None)
        assert set(times) == set(jobs_of(bare.layers)), notes
        assert len(times["layers"]) == len(bare.layers.names)
        assert all(isinstance(timing, Timing) and timing.median > 0 for timing in times["job 0"])
        processes = [process._process for process in timers._processes]
        assert all(process.poll() is None for process in processes)
    finally:
        timers.close()
    assert all(process.poll() is not None for process in processes)


def test_what_a_process_failed_at_is_built_here(tiny, runner):
    """The process cannot import what the denoiser consists of, this one can."""
    bare, leaves = runner
    tiny.denoiser.note = type("Unknown", (), {"__module__": __name__})
    sys.modules[__name__].Unknown = tiny.denoiser.note
    notes = []
    timers = ProcessTimers(tiny.denoiser, bare.signature, {"cond": leaves, "uncond": leaves}, count=1,
                           threads=1, on_note=notes.append)
    try:
        timers.start(jobs_of(bare.layers))
        times = timers.finish(1, time.monotonic() + 300, lambda done, total: None)
        assert set(times) == set(jobs_of(bare.layers))
        assert "failed" in notes[0]
        timers.start(jobs_of(bare.layers))
        assert timers.finish(1, time.monotonic(), lambda done, total: None) == {}
    finally:
        timers.close()
        del tiny.denoiser.note


def test_when_the_time_is_over_a_profile_says_what_it_lacks(tiny):
    profile = hc.profile_costs(tiny.denoiser, call=tiny.call, threads=1, max_seconds=0.0)
    timing = profile.costs.timing
    assert not profile.costs.stages
    assert not timing.settled
    assert any(name.startswith("whole") for name in timing.missing)
    assert "INCOMPLETE" in "".join(str(line) for line in describe_timing(profile))
    assert hc.plan(profile, gpus=2, policy="exact").predictions.latency_s > 0


def test_samples_are_taken_without_gradients(tiny, runner, monkeypatch):
    """As pipelines run their denoisers, whatever the parameters say."""
    bare, leaves = runner
    seen = []
    run = SegmentRunner.run
    monkeypatch.setattr(SegmentRunner, "run", lambda *a, **k: (seen.append(torch.is_grad_enabled()), run(*a, **k))[1])
    builder = GraphBuilder(tiny.denoiser, bare.signature, {"cond": leaves, "uncond": leaves}, {1: bare.captured(1)})
    sampler = builder.sampler(Job(kind="segment", backend="eager", patterns=(Pattern.parse("s", "u0@0 c0@1 | cfg"),)))
    assert torch.is_grad_enabled()
    sampler()
    assert seen
    assert not any(seen)


def test_weights_that_were_joined_are_so_in_other_processes() -> None:
    """Else every process that compiles would move copies of its own."""
    given = [torch.nn.Parameter(torch.randn(32, 8)) for _ in range(3)]
    join_parameters(given)
    shared = share_tensors(given)
    seen = [torch.nn.Parameter(tensor) for tensor in pickle.loads(shared)]  # noqa: S301 - from the line above
    before = [tensor.data_ptr() for tensor in seen]
    assert torch.equal(join_parameters(seen), torch.cat(given))
    assert [tensor.data_ptr() for tensor in seen] == before
