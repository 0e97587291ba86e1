"""Recognising generations, steps and guidance from the calls alone."""

import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from hybridiff_compiler.ir import InputError
from hybridiff_compiler.runtime.intercept import find_denoiser, intercept
from hybridiff_compiler.runtime.scheduler_watch import SchedulerWatch, tell_first_step
from hybridiff_compiler.runtime.simulator import Simulator

from .tiny import SIZE, TOKENS, WIDTH, TinyPipeline, tiny_plan


class Log:
    """Counts what it is asked and answers with the latents."""

    def __init__(self, covered=True):
        self.starts, self.steps, self.covered = [], [], covered

    def start(self, num_steps, signature):
        self.starts.append((num_steps, signature))
        return self.covered

    def step(self, call):
        self.steps.append((call.step, call.num_steps))
        latents = {b: next(iter(call.inputs[b].values())) for b in call.inputs}
        assert torch.equal(latents["uncond"], latents["cond"])
        return latents


def test_every_step_of_every_generation_is_seen_in_order(bench):
    log = Log()
    with intercept(bench.pipe, log):
        bench.image(steps=4)
        bench.image(steps=5)
    assert [n for n, _ in log.starts] == [4, 5]
    assert log.steps == [(i, 4) for i in range(4)] + [(i, 5) for i in range(5)]


def test_everything_is_restored(bench):
    before = bench.image(steps=3)
    forward = bench.denoiser.forward
    with intercept(bench.pipe, Log()):
        assert bench.denoiser.forward != forward
        bench.image(steps=3)
    assert bench.denoiser.forward == forward
    assert "set_timesteps" not in vars(bench.pipe.scheduler)
    assert torch.equal(bench.image(steps=3), before)


def test_unguided_and_uncovered_generations_use_the_original_forward(bench):
    log = Log(covered=False)
    with intercept(bench.pipe, log):
        covered = bench.image(steps=3)
    assert log.steps == []
    assert torch.equal(covered, bench.image(steps=3))
    log = Log()
    generator = torch.Generator().manual_seed(0)
    with intercept(bench.pipe, log):
        bench.pipe("a cat", num_inference_steps=3, guidance_scale=1.0, generator=generator)
    assert log.starts == []


def test_two_images_without_guidance_are_not_taken_for_guidance(bench):
    log = Log()
    with intercept(bench.pipe, log):
        bench.pipe(["a cat", "a dog"], num_inference_steps=2, guidance_scale=1.0)
    assert log.starts == []


def test_a_replaced_scheduler_is_followed():
    from hybridiff_compiler import reference_models

    pipe = reference_models.load("unet")
    log = Log()
    with intercept(pipe, log):
        pipe("a cat", num_inference_steps=3)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe("a cat", num_inference_steps=4)
    assert [n for n, _ in log.starts] == [3, 4]
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_an_interrupted_generation_does_not_shift_the_next(bench):
    log = Log()

    def stop(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    with intercept(bench.pipe, log):
        with pytest.raises(KeyboardInterrupt):
            bench.image(steps=5, callback_on_step_end=stop)
        bench.image(steps=3)
    assert log.steps == [(0, 5)] + [(i, 3) for i in range(3)]


def test_denoiser_is_found_by_its_forward(bench):
    assert find_denoiser(bench.pipe) == (bench.attribute, bench.denoiser)

    class NoDenoiser:
        components = {"vae": bench.pipe.vae}  # noqa: RUF012

    with pytest.raises(InputError, match="0 components"):
        find_denoiser(NoDenoiser())


@pytest.mark.parametrize("name", [
    "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler",
    "DDIMScheduler", "LMSDiscreteScheduler",
])
def test_schedulers_take_the_steps_that_they_would_find(bench, name):
    """A scheduler is told where a generation begins; it must go through the same steps as without."""
    known = bench.pipe.scheduler
    found = []

    class Looking(Log):
        def start(self, num_steps, signature):
            scheduler = bench.pipe.scheduler
            found.append(getattr(scheduler, "begin_index", None))
            return super().start(num_steps, signature)

    try:
        bench.pipe.scheduler = getattr(diffusers, name).from_config(known.config)
        expected = [bench.image(steps=4) for _ in range(2)]
        with intercept(bench.pipe, Looking(covered=False)):
            assert all(torch.equal(bench.image(steps=4), image) for image in expected)
    finally:
        bench.pipe.scheduler = known
    ambiguous = name == "HeunDiscreteScheduler" and bench.name == "mmdit"  # the pipeline of the other tells it itself
    assert found == [None if ambiguous or name == "DDIMScheduler" else 0] * 2


def test_a_generation_may_begin_at_a_later_step():
    scheduler = DPMSolverMultistepScheduler()
    samples = []
    for told in (False, True):
        scheduler.set_timesteps(6)
        if told:
            tell_first_step(scheduler, [float(t) for t in scheduler.timesteps], 2)
            assert scheduler.begin_index == 2
        sample = torch.ones(1, 4, 2, 2)
        for t in scheduler.timesteps[2:]:
            sample = scheduler.step(sample * 0.3, t, sample).prev_sample
        samples.append(sample)
    assert torch.equal(*samples)
    scheduler.set_timesteps(6)
    tell_first_step(scheduler, [5.0, 5.0, 1.0], 0)
    assert scheduler.begin_index is None, "timesteps that are not distinct"


class Timesteps(Log):
    """Remembers the timesteps that it is told, and the step's own."""

    def __init__(self):
        super().__init__()
        self.told, self.own = [], []

    def step(self, call):
        self.told.append(None if call.timesteps is None else call.timesteps.clone())
        self.own.append(float(call.inputs["cond"]["timestep"]))
        return super().step(call)


def test_the_timesteps_of_all_steps_are_told(bench):
    log = Timesteps()
    with intercept(bench.pipe, log):
        bench.image(steps=5)
    assert len(log.told) == 5
    for told in log.told:
        assert told.tolist() == log.own


@pytest.mark.parametrize("change", [lambda t: t / 1000, lambda t: t + 1, lambda t: t.clone(), lambda t: t.double()])
def test_timesteps_that_are_not_the_scheduler_s_own_are_not_told(bench, change):
    """What a pipeline makes of them for its next steps cannot be known."""
    log = Timesteps()
    with intercept(bench.pipe, log):
        routed = bench.denoiser.forward

        def changed(*args, **kwargs):
            if "timestep" in kwargs:
                return routed(*args, **kwargs | {"timestep": change(kwargs["timestep"])})
            return routed(args[0], change(args[1]), *args[2:], **kwargs)

        bench.denoiser.forward = changed
        try:
            bench.image(steps=3)
        finally:
            bench.denoiser.forward = routed
    assert log.told == [None] * 3


def test_a_compiled_denoiser():
    """Dynamo must not trace what stands in its place, and a wrapper has no forward to look at."""
    pipe, log = TinyPipeline(), Log()
    pipe.denoiser.compile(backend="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with intercept(pipe, log):
        pipe(num_inference_steps=3)
    assert log.starts
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    pipe.denoiser = torch.compile(pipe.denoiser)
    with pytest.raises(InputError, match=r"what torch.compile made .*_orig_mod"):
        find_denoiser(pipe)


@pytest.mark.parametrize(("steps", "exact"), [
    ("branch cond-mirror reuse branch", 1), ("branch branch cond-mirror reuse", 2),
])
def test_images_of_one_seed_without_guidance_are_not_two_branches(steps, exact):
    """They begin as equal latents with different prompts, which is how guidance begins, too."""
    pipe = TinyPipeline()
    plan = tiny_plan(pipe, steps)
    embeddings = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def unguided(steps=8):
        latents = torch.ones(2, 4, SIZE, SIZE)
        pipe.scheduler.set_timesteps(steps)
        for timestep in pipe.scheduler.timesteps:
            (estimate,) = pipe.denoiser(latents, timestep, embeddings, return_dict=False)
            latents = latents - estimate / steps
        return latents

    plain = unguided()
    simulator = Simulator(plan, pipe.denoiser)
    known = {"exact_at": lambda step, of: plan.pattern(plan.schedule.steps[step]).is_exact} if exact > 1 else {}
    with intercept(pipe, simulator, **known):
        assert torch.allclose(unguided(), plain, atol=1e-5)
        assert len(simulator.executed) == exact, "what follows exact steps runs on"
        pipe(1)
        assert len(simulator.executed) == 8


def test_calls_after_steps_of_the_handler_are_announced():
    """Guidance that is cut off: what the ranks were given to do before must be looked after."""
    pipe = TinyPipeline()
    left = []
    with intercept(pipe, Simulator(tiny_plan(pipe), pipe.denoiser), left=lambda: left.append(step)):
        step = "guided"
        pipe(1)
        step = "never guided"
        pipe(1, guidance_scale=1.0)
        assert left == []
        latents, embeddings = torch.randn(1, 4, SIZE, SIZE), torch.randn(2, TOKENS, WIDTH)
        pipe.scheduler.set_timesteps(8)
        for step, timestep in enumerate(pipe.scheduler.timesteps):
            guided = step < 5
            inputs = (torch.cat([latents] * 2), timestep, embeddings) if guided else (latents, timestep, embeddings[1:])
            (estimate,) = pipe.denoiser(*inputs, return_dict=False)
            latents = latents - estimate[:1] / 8
        assert left == [5, 6, 7]
        left.clear()
        pipe(1)
        assert left == []


def test_a_network_that_controls_the_denoiser_is_not_one(bench):
    class Control(torch.nn.Module):
        def forward(self, sample, timestep, conditioning_scale=1.0):
            """As ControlNets."""

    class Controlled:
        components = {"controlnet": Control(), bench.attribute: bench.denoiser}  # noqa: RUF012

    assert find_denoiser(Controlled()) == (bench.attribute, bench.denoiser)


@pytest.mark.parametrize(("first", "begin", "steps"), [
    (lambda t: t[2].bfloat16(), None, 4), (lambda t: t[2] / 1000, None, 4), (lambda t: t[-1] * 0, None, 6),
    (lambda t: t[0] * 0 + 0.25, None, 6), (lambda t: t[0] * 0 + 0.25, 3, 3),
])
def test_where_a_generation_begins(first, begin, steps):
    """From what the scheduler was told, else from the timestep; one that means something else tells nothing."""
    pipe = TinyPipeline()
    pipe.scheduler = DPMSolverMultistepScheduler()
    watch = SchedulerWatch(pipe, None)
    watch.follow()
    pipe.scheduler.set_timesteps(6)
    if begin is not None:
        pipe.scheduler.set_begin_index(begin)
    assert watch.begin(first(pipe.scheduler.timesteps.float())) == steps
    assert pipe.scheduler.begin_index == (begin if begin is not None else None if steps == 6 else 2)
    watch.release()
