"""Linear propagation of step errors against brute force: finishing the generation after each deviation."""

import math

import pytest
import torch

from hybridiff_compiler.ir import InputError
from hybridiff_compiler.profiler.decode import decoder_of
from hybridiff_compiler.profiler.linear import sampler_map
from hybridiff_compiler.profiler.record import Option, Recorder, guided, options_of
from hybridiff_compiler.profiler.sensitivity import image_error, propagate, pull_back_images
from hybridiff_compiler.runtime.segments import SegmentRunner
from hybridiff_compiler.runtime.simulator import run_pattern

STEPS, SCALE, PROBES = 8, 5.0, 24


@pytest.fixture(scope="module")
def propagated(bench):
    patterns = [p for p in bench.patterns if p.name != "single"]
    branch = next(p for p in patterns if p.name == "branch")
    runner = SegmentRunner(bench.denoiser, bench.signature, patterns, [bench.partitions["nested"]])
    options = options_of(patterns, (1, 2))
    generation = bench.generation(STEPS)
    recorder = Recorder(lambda: bench.pipe.scheduler, runner, [branch, *patterns], options, SCALE)
    final = generation.latents(["a cat"], recorder)
    record = recorder.recording
    sampler = sampler_map(record.scheduler, STEPS)
    path = bench.signature.leaves[0].path
    decode = decoder_of(bench.pipe)
    probes, pixels = pull_back_images(decode, final, PROBES, seed=1)
    sketches = propagate(record, runner, branch, sampler, path, probes, pixels, SCALE)
    return generation, runner, branch, record, final, decode, sketches


class Deviating:
    """Exact steps, except that one step's estimate is moved."""

    def __init__(self, runner, branch, step, deviation):
        self.runner, self.branch, self.at, self.deviation = runner, branch, step, deviation

    def start(self, num_steps, signature):
        return True

    @torch.no_grad()
    def step(self, call):
        pair, _ = run_pattern(self.runner, self.branch, call.inputs, {})
        if call.step == self.at:  # moving both branches alike moves the guided estimate by the same
            pair = {branch: estimate + self.deviation for branch, estimate in pair.items()}
        return pair


@pytest.mark.parametrize("step", [2, 4, 6])
def test_predicted_image_error_is_the_measured_one(propagated, step):
    generation, runner, branch, record, final, decode, sketches = propagated
    option = Option("branch-reuse", "activations", 1)
    deviation = record.deviations[step][option]
    small = 0.05 / max(0.05, float(deviation.abs().max()))  # stay where the network is nearly linear
    moved = generation.latents(["a cat"], Deviating(runner, branch, step, small * deviation))
    with torch.no_grad():
        measured = float((decode(moved) - decode(final)).pow(2).mean().sqrt())
    predicted = small * image_error([sketches.steps[step][option]], sketches.pixels)
    assert predicted == pytest.approx(measured, rel=0.35)


def test_every_option_old_enough_is_recorded(propagated):
    _, _, _, record, *_ = propagated
    names = {option.pattern for option in record.deviations[-1]}
    assert names == {"paper", "cond-pipe", "branch-reuse", "reuse"}
    assert all(option.age <= 1 for option in record.deviations[1])
    assert record.deviations[0] == {}


def test_reuse_deviation_is_the_difference_of_guided_estimates(propagated):
    _, _, _, record, *_ = propagated
    expected = guided(record.pairs[3], SCALE) - guided(record.pairs[5], SCALE)
    assert torch.equal(record.deviations[5][Option("reuse", "memory", 2)], expected)


def test_image_error_takes_out_the_bias_of_few_probes():
    generator = torch.Generator().manual_seed(0)
    sketch = 3.0 * torch.randn(4, 20000, generator=generator, dtype=torch.float64)
    assert image_error([sketch], pixels=9) == pytest.approx(1.0, rel=0.02)
    assert math.isfinite(image_error([torch.zeros(2, 3, dtype=torch.float64)], 4))


def test_images_that_are_not_numbers_are_refused():
    final = torch.ones(1, 4, 2, 2)
    pull_back_images(lambda latents: 3 * latents, final, 2, seed=0)
    with pytest.raises(InputError, match="the images of an exact generation are not finite"):
        pull_back_images(lambda latents: latents / 0, final, 2, seed=0)
