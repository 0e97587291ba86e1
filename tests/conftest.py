"""Shared fixtures: the bundled models, loaded once per session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("USE_FLAX", "0")

import signal

import pytest
import torch

from hybridiff_compiler import reference_models
from hybridiff_compiler.ir import ModelInfo, Partition, Pattern, Plan, RankSpec
from hybridiff_compiler.ir.schedule import FixedSchedule, parse_steps
from hybridiff_compiler.profiler.generate import FirstCall, Generation
from hybridiff_compiler.runtime.branch_calls import capture_branch
from hybridiff_compiler.runtime.intercept import find_denoiser

# A shell that starts the tests in the background makes them ignore Ctrl-C, and their subprocesses too; some test it.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # two cores, several test processes: more threads only wait for each other

TABLES = {
    "single": ("u0@0 c0@0 | cfg", None),
    "branch": ("u0@0 c0@1 | cfg", None),
    "paper": ("u0@0(c1~) c1@1(u0~) | mirror", "split"),
    "cond-pipe": ("c0@0(c1~) c1@1(c0~) | delta", "split"),
    "branch-reuse": ("u1@0(u0~) c1@1(c0~) | cfg", "split"),
    "reuse": ("- | last", None),
}


class Bench:
    """A bundled pipeline with hand-made tables over one split of its layers."""

    def __init__(self, name):
        self.name = name
        self.pipe = reference_models.load(name)
        self.attribute, self.denoiser = find_denoiser(self.pipe)
        defaults = reference_models.DEFAULTS[name]
        self.options = {k: v for k, v in defaults.items() if k not in ("num_inference_steps", "guidance_scale")}
        first = FirstCall()
        self.generation(3).latents(["a cat"], first)
        self.signature, self.call = first.require()
        self.layers = capture_branch(self.denoiser, self.signature).layers
        names = self.layers.names
        third = len(names) // 3
        self.partitions = {
            "nested": Partition(
                name="split", stages=(names[third : 2 * third], names[:third] + names[2 * third :])
            ),
            "linear": Partition(name="split", stages=(names[: len(names) // 2], names[len(names) // 2 :])),
        }
        self.patterns = tuple(
            Pattern.parse(n, table, **({"partition": p, "stages": 2} if p else {})) for n, (table, p) in TABLES.items()
        )

    def generation(self, steps):
        """How images are made, for the profiler."""
        return Generation(pipe=self.pipe, num_inference_steps=steps, guidance_scale=5.0, options=self.options)

    def plan(self, schedule, split="nested", ranks=2):
        """A plan over all tables; `schedule` is run-length text or a schedule object."""
        if isinstance(schedule, str):
            schedule = FixedSchedule(steps=parse_steps(schedule))
        info = ModelInfo(
            name=self.name, denoiser=type(self.denoiser).__name__, fingerprint=self.layers.fingerprint(),
            parameter_bytes=0, dtype="float32", signature=self.signature,
        )
        return Plan(
            model=info, ranks=(RankSpec(device="cpu"),) * ranks, partitions=(self.partitions[split],),
            patterns=self.patterns, exact="branch", schedule=schedule,
        )

    def image(self, steps=6, prompt="a cat", seed=0, **kwargs):
        """One image as a [1, 3, H, W] tensor in [0, 1]."""
        generator = torch.Generator().manual_seed(seed)
        return self.pipe(
            prompt, num_inference_steps=steps, guidance_scale=5.0, generator=generator, output_type="pt",
            **self.options, **kwargs,
        ).images


@pytest.fixture(scope="session", params=["unet", "mmdit"])
def bench(request):
    """Both bundled models in turn."""
    return Bench(request.param)
