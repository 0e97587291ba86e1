"""The survey of how much values change from step to step, against what recorded generations say."""

import pytest
import torch

from hybridiff_compiler.profiler.partial import Partial
from hybridiff_compiler.profiler.record import Recorder, options_of
from hybridiff_compiler.profiler.redundancy import sampled, survey_redundancy
from hybridiff_compiler.runtime.segments import SegmentRunner

STEPS = 4


@torch.no_grad()
def test_every_value_is_surveyed_and_as_recorded(bench, tmp_path):
    bare = SegmentRunner(bench.denoiser, bench.signature, (), ())
    told = []
    file, settings = tmp_path / "p.partial", {"model": bench.name}
    found = survey_redundancy(
        bare.captured(1), bench.generation(STEPS), ["a cat", "a dog"], Partial(file, settings),
        on_step=lambda done, total: told.append((done, total)),
    )
    assert told == [(done, 2 * STEPS) for done in range(1, 2 * STEPS + 1)]
    assert set(found.change) == {value.name for value in bench.layers.values}
    assert {len(row) for row in found.change.values()} == {STEPS - 1}

    runner = SegmentRunner(
        bench.denoiser, bench.signature, bench.patterns, [bench.partitions["nested"]], captured=bare.captured(1)
    )
    options = options_of([pattern for pattern in bench.patterns if pattern.name == "branch-reuse"], (1,))
    recorded = []
    for first, prompt in enumerate(["a cat", "a dog"]):
        recorder = Recorder(lambda: bench.pipe.scheduler, runner, bench.patterns, options, 5.0)
        bench.generation(STEPS).latents([prompt], recorder, first)
        recorded.append(recorder.recording.changes)
    names = set(recorded[0][0])
    assert names
    for name in names:
        expected = [(one[name] + other[name]) / 2 for one, other in zip(*recorded)]
        # Large values are sampled.
        assert found.change[name] == pytest.approx(expected, rel=0.02, abs=1e-6)

    again = survey_redundancy(
        bare.captured(1), bench.generation(STEPS), ["a cat", "a dog"], Partial(file, settings),
        on_step=lambda done, total: pytest.fail("it was kept"),
    )
    assert again == found


def test_what_is_no_plain_number_is_compared_too():
    assert sampled(torch.tensor([True, False])).tolist() == [1.0, 0.0]
    assert sampled(torch.tensor([1 + 2j])).tolist() == [1.0, 2.0]
    assert sampled(torch.tensor([-torch.inf, torch.nan, 3.0], dtype=torch.float16)).tolist() == [0.0, 0.0, 3.0]
    assert sampled(torch.tensor(7, dtype=torch.int64)).tolist() == [7.0]
    many = sampled(torch.arange(200_000, dtype=torch.float32).reshape(2, 100_000))
    assert many[:3].tolist() == [0.0, 4.0, 8.0]
    kept = torch.zeros(3)
    taken = sampled(kept)
    kept += 1  # a value that is overwritten later
    assert taken.tolist() == [0.0, 0.0, 0.0]
