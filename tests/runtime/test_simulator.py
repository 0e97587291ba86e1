"""The simulator against plain diffusers and against hand-written steps."""

import pytest
import torch

from hybridiff_compiler.ir import AdaptiveSchedule, Combine, Pattern
from hybridiff_compiler.runtime.estimates import EstimateMemory
from hybridiff_compiler.runtime.intercept import intercept
from hybridiff_compiler.runtime.schedule_state import ScheduleState, discrepancy
from hybridiff_compiler.runtime.simulator import Simulator


def simulate(bench, plan, **kwargs):
    simulator = Simulator(plan, bench.denoiser)
    with intercept(bench.pipe, simulator):
        image = bench.image(**kwargs)
    return image, simulator


def test_single_equals_plain_diffusers_bit_for_bit(bench):
    image, simulator = simulate(bench, bench.plan("single*6"))
    assert simulator.executed == ["single"] * 6
    assert torch.equal(image, bench.image())


def test_branch_differs_from_plain_diffusers_by_batch_numerics_only(bench):
    image, _ = simulate(bench, bench.plan("branch*6"))
    assert (image - bench.image()).abs().max() < 1e-3


def test_a_branch_step_is_two_calls_of_the_original_denoiser(bench):
    """The split-batch reference: each branch through the module itself."""
    recorded = {}

    class TwoCalls:
        def start(self, num_steps, signature):
            return True

        def step(self, call):
            recorded[call.step] = call
            return {b: module_call(bench, call.inputs[b]) for b in ("uncond", "cond")}

    with intercept(bench.pipe, TwoCalls()):
        expected = bench.image()
    assert torch.equal(simulate(bench, bench.plan("branch*6"))[0], expected)
    assert sorted(recorded) == list(range(6))


@torch.no_grad()
def module_call(bench, inputs):
    kwargs = {}
    for path, tensor in inputs.items():
        *parents, last = path.split(".")
        target = kwargs
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = tensor
    forward = type(bench.denoiser).forward
    return forward(bench.denoiser, **kwargs, return_dict=False)[0]


@pytest.mark.parametrize("split", ["nested", "linear"])
@pytest.mark.parametrize("cheap", ["paper", "cond-pipe", "branch-reuse", "reuse"])
def test_cheap_patterns_change_the_image_a_little(bench, cheap, split):
    exact, _ = simulate(bench, bench.plan("branch*6", split))
    image, simulator = simulate(bench, bench.plan(f"branch*3 {cheap} branch*2", split))
    assert simulator.executed == ["branch"] * 3 + [cheap] + ["branch"] * 2
    difference = (image - exact).abs().max()
    assert difference > 0
    assert image.shape == exact.shape
    assert torch.isfinite(image).all()


def test_prompts_simulated_together_are_the_prompts_alone(bench):
    plan = bench.plan("branch*3 branch-reuse reuse branch")
    simulator = Simulator(plan, bench.denoiser)

    def images(prompts, seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return bench.pipe(
            prompts, num_inference_steps=6, guidance_scale=5.0, generator=generators, output_type="pt", **bench.options
        ).images

    with intercept(bench.pipe, simulator):
        together = images(["a cat", "a dog"], [1, 2])
        alone = torch.cat([images(["a cat"], [1]), images(["a dog"], [2])])
    assert (together - alone).abs().max() < 1e-3


def test_another_number_of_steps_runs_the_exact_pattern(bench):
    image, simulator = simulate(bench, bench.plan("branch*3 reuse*3"), steps=4)
    assert simulator.executed == ["branch"] * 4
    assert (image - bench.image(steps=4)).abs().max() < 1e-3


def test_adaptive_schedule_online_is_its_resolution(bench):
    rule = AdaptiveSchedule(
        num_steps=12, warmup="branch", window="paper", history=2, eps=0.5, k=3, tau_cap=8, lag=2
    )
    plan = bench.plan(rule)
    measured = []

    class Watching(Simulator):
        def step(self, call):
            pair = super().step(call)
            measured.append(float(discrepancy(pair)))
            return pair

    simulator = Watching(plan, bench.denoiser)
    with intercept(bench.pipe, simulator):
        bench.image(steps=12)
    start = simulator.executed.index("paper")
    expected = rule.resolve(measured[:start])
    assert tuple(simulator.executed) == expected.steps


def test_state_of_the_adaptive_rule_fires_at_the_cap():
    rule = AdaptiveSchedule(num_steps=10, warmup="b", window="p", history=2, eps=1e-6, k=2, tau_cap=5)
    state = ScheduleState(rule)
    names = []
    for step in range(10):
        names.append(state.pattern_at(step))
        rising = torch.full((1, 1), 1.0 + step)
        state.observe(step, {"uncond": torch.ones(1, 1), "cond": rising})
    assert names == ["b"] * 5 + ["p"] * 2 + ["b"] * 3


EXACT = Pattern.parse("exact", "u0@0 c0@1 | cfg")
CHEAP = Pattern.parse("cheap", "u1@0(u0~) c1@1(c0~) | cfg", partition="p", stages=2)
DELTA = Pattern.parse("delta", "c0@0 | delta")
MIRROR = Pattern.parse("mirror", "c0@0 | mirror")
LAST = Pattern.parse("last", "- | last")


def test_estimate_memory_combines_as_the_tables_say():
    memory = EstimateMemory()
    u, c, c2 = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([4.0])
    assert memory.pair(EXACT, {"uncond": u, "cond": c}, 0) == {"uncond": u, "cond": c}
    delta = memory.pair(DELTA, {"cond": c2}, 1)
    assert delta["cond"] == 4
    assert delta["uncond"] == 2
    assert memory.pair(LAST, {}, 2)["uncond"] == 2
    mirror = memory.pair(MIRROR, {"cond": c}, 3)
    assert mirror["uncond"] is mirror["cond"]
    assert memory.pair(LAST, {}, 4)["uncond"] is not mirror["uncond"]  # guidance is not lost for longer
    assert memory.pair(DELTA, {"cond": c2}, 5)["uncond"] == 2  # the guided pair, not the mirrored one


@pytest.mark.parametrize("trend", [0.5, 1.0])
def test_a_trend_is_a_line_through_the_last_two_exact_pairs(trend: float):
    memory = EstimateMemory()
    pattern = Pattern(name="t", combine=Combine.LAST, trend=trend)

    def pair(value: float) -> dict[str, torch.Tensor]:
        return {"uncond": torch.tensor([value]), "cond": torch.tensor([2 * value])}

    for step, value in ((0, 50.0), (1, 10.0), (4, 16.0)):
        memory.pair(EXACT, pair(value), step)
    memory.pair(CHEAP, pair(-99.0), 5)  # is not exact, so no line goes through it
    memory.pair(DELTA, {"cond": torch.tensor([7.0])}, 6)
    found = memory.pair(pattern, {}, 7)
    assert found["uncond"] == pytest.approx(16 + trend * (7 - 4) / (4 - 1) * (16 - 10))
    assert found["cond"] == pytest.approx(32 + trend * (7 - 4) / (4 - 1) * (32 - 20))
    assert memory.pair(pattern, {}, 8)["uncond"] == pytest.approx(16 + trend * (8 - 4) / (4 - 1) * (16 - 10))
