"""Measuring prompts for adaptive plans: discrepancy curves and the PSNR of planned schedules, per prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir import Branch, UsageError
from ..planner import PromptSamples
from ..runtime.intercept import GuidedCall, intercept
from ..runtime.simulator import Simulator
from .equal_cost import Judge
from .measure import generate

__all__ = ["measure_prompts"]


class _Recording(Simulator):
    """A simulator that notes the discrepancy of every step, per image."""

    def start(self, num_steps: int, signature: Any) -> bool:
        """See `Simulator`; a new list of steps."""
        self.curves: list[Tensor] = []
        return super().start(num_steps, signature)

    def step(self, call: GuidedCall) -> Mapping[Branch, Tensor]:
        """See `Simulator`."""
        pair = super().step(call)
        uncond, cond = pair["uncond"].float(), pair["cond"].float()
        self.curves.append((cond - uncond).abs().flatten(1).mean(1) / uncond.abs().flatten(1).mean(1))
        return pair


def measure_prompts(judge: Judge, speedups: Sequence[float]) -> PromptSamples:
    """Discrepancies of the judge's prompts, and their PSNR by the planned schedule of every speed-up (in denoiser
    evaluations).

    Raises:
        UsageError: no schedule is so fast.
    """
    rows = [judge.planned(speedup) for speedup in speedups]
    usable = [row for row in rows if row is not None]
    if not usable:
        raise UsageError(f"no schedule reaches any of {list(speedups)}; give smaller speed-ups")
    exact = judge.plan((judge.exact,) * judge.num_steps)
    recording = _Recording(exact, judge.denoiser, runners=judge.runners)
    curves: list[list[float]] = []
    with intercept(judge.generation.pipe, recording), torch.no_grad():
        for start in range(0, len(judge.prompts), judge.batch):
            generate(judge.generation, judge.prompts[start : start + judge.batch], first=start)
            curves += torch.stack(recording.curves, dim=1).tolist()
    return PromptSamples(
        fingerprint=judge.profile.model.fingerprint, num_steps=judge.num_steps, prompts=tuple(judge.prompts),
        rel_mae=tuple(tuple(float(f"{value:.6g}") for value in row) for row in curves),
        schedules=tuple(row.schedule for row in usable),
        psnr_db=tuple(tuple(round(value, 4) for value in judge.measure(row)) for row in usable),
    )
