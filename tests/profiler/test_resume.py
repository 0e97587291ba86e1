"""Schedules are begun with the steps of an exact generation that are known."""

import pytest
import torch

from hybridiff_compiler.ir import BRANCHES, FixedSchedule, Pattern, Plan
from hybridiff_compiler.planner import exact_patterns
from hybridiff_compiler.profiler.resume import Resumed, known_steps
from hybridiff_compiler.runtime.simulator import Simulator

BRANCH = next(pattern for pattern in exact_patterns(2) if pattern.name == "branch")
REUSE = Pattern.parse("reuse", "- | last")
TREND = Pattern.parse("trend", "- | last+1")
PATTERNS = {pattern.name: pattern for pattern in (BRANCH, REUSE, TREND)}


@pytest.mark.parametrize(("steps", "known"), [
    ("branch branch branch reuse branch", 1), ("branch reuse branch", 0), ("branch branch trend", 0),
    ("branch branch branch branch", 2),
])
def test_what_cheap_steps_look_back_to_is_computed(steps, known):
    assert known_steps(PATTERNS, steps.split()) == known


class Recorded:
    """An exact generation, with its estimates."""

    def __init__(self, simulator):
        self.simulator, self.pairs = simulator, []

    def start(self, num_steps, signature):
        return self.simulator.start(num_steps, signature)

    def step(self, call):
        pair = self.simulator.step(call)
        self.pairs.append(torch.stack([pair[branch] for branch in BRANCHES]))
        return pair


def test_the_images_are_the_same(bench):
    steps = ("branch", "branch", "branch", "branch", "trend", "branch", "reuse", "branch")
    generation = bench.generation(len(steps))

    def simulator(names):
        plan = bench.plan(FixedSchedule(steps=("branch",) * len(names)))
        changed = {"patterns": tuple(PATTERNS.values()), "partitions": (), "schedule": FixedSchedule(steps=names)}
        return Simulator(Plan(**(dict(plan) | changed)), bench.denoiser)

    exact, counted = Recorded(simulator(("branch",) * len(steps))), simulator(steps)
    generation.latents(["a cat"], exact)
    known = torch.stack(exact.pairs[: known_steps(PATTERNS, steps)])
    assert len(known) == 2
    resumed = generation.latents(["a cat"], Resumed(counted, known))
    assert counted.executed == list(steps[2:])
    assert torch.equal(resumed, generation.latents(["a cat"], simulator(steps)))
