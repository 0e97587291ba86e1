"""What needs CUDA devices; skipped with the reason where they are missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runtime.tiny import TWO_RANKS, SignatureRecorder, make_plan

from hybridiff_compiler import reference_models
from hybridiff_compiler.ir import Plan
from hybridiff_compiler.runtime.intercept import find_denoiser, intercept
from hybridiff_compiler.runtime.segments import SegmentRunner
from hybridiff_compiler.runtime.simulator import Simulator

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder, and skip it without two GPUs, or without the one that `one_gpu` tests need."""
    count = torch.cuda.device_count()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            needed = 1 if item.get_closest_marker("one_gpu") else 2
            if count < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), this machine has {count}"))


class GpuModel:
    """bundled:unet in fp16 on the first GPU, a plan over all two-rank tables, and its simulator."""

    def __init__(self) -> None:
        self.pipe, self._other = (self._load() for _ in range(2))  # a pipeline runs by one plan at a time
        self.denoiser = find_denoiser(self.pipe)[1]
        recorder = SignatureRecorder()
        with intercept(self.pipe, recorder):
            self.plain = self("a red apple")
        self.plan = make_plan(
            self.denoiser, recorder.signature, ("branch",) * 8, tables=TWO_RANKS, device="cuda"
        )
        self._runners: dict[tuple, dict[int, SegmentRunner]] = {}

    @staticmethod
    def _load():  # type: ignore[no-untyped-def]
        pipe = reference_models.load("unet", torch_dtype=torch.float16).to("cuda")
        pipe.set_progress_bar_config(disable=True)
        find_denoiser(pipe)[1].requires_grad_(False)
        return pipe

    def __call__(self, prompt: str, pipe=None, **kwargs) -> torch.Tensor:  # type: ignore[no-untyped-def]
        arguments = reference_models.DEFAULTS["unet"] | {"num_inference_steps": 8} | kwargs
        generator = torch.Generator().manual_seed(1)
        return (pipe or self.pipe)(prompt, generator=generator, output_type="latent", **arguments).images

    def simulate(self, plan: Plan, prompt: str, backend: str = "eager", **kwargs) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Latents as one device makes them with the same graphs."""
        known = self._runners.setdefault((backend, plan.patterns, plan.partitions), {})
        with intercept(self._other, Simulator(plan, find_denoiser(self._other)[1], backend=backend, runners=known)):
            return self(prompt, self._other, **kwargs)


@pytest.fixture(scope="session")
def model() -> GpuModel:
    """One for all tests."""
    return GpuModel()


@pytest.fixture(scope="session")
def check() -> Callable[..., None]:
    """`check(got, expected)`: equal within fp16 rounding; prints the largest difference."""

    def compare(got: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
        difference = float((got.float() - expected.float()).abs().max())
        print(f"{what}: largest difference {difference:.2e} of {float(expected.abs().max()):.2f}")
        assert torch.isfinite(expected).all()
        assert torch.allclose(got.float(), expected.float(), atol=2e-2, rtol=1e-2)

    return compare
