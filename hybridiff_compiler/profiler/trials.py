"""Whole schedules on prompts whose exact images are known: what a fit of how errors add up is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ir import FixedSchedule, ModelInfo, Partition, Pattern, Plan, RankSpec
from ..quality import MAX_PSNR_DB, psnr
from ..runtime.segments import SegmentRunner
from ..runtime.simulator import Simulator
from .batches import Batch
from .decode import decoder_of
from .generate import Generation
from .resume import Resumed

__all__ = ["KEPT_BYTES", "Trial", "Trials", "work_of"]

KEPT_BYTES = 64 << 20
"""Most memory for estimates of exact steps with which schedules are begun, and for images to compare with."""


@dataclass(frozen=True)
class Trial:
    """A schedule to measure whole."""

    number: int
    steps: tuple[str, ...]
    block: list[Batch]
    """Prompts, with what need not be computed of them."""


class Trials:
    """Runs schedules on the single-device simulator."""

    def __init__(
        self, generation: Generation, denoiser: nn.Module, partitions: Sequence[Partition],
        patterns: Sequence[Pattern], exact: Pattern, runner: Callable[[int], SegmentRunner], prompts: int,
    ) -> None:
        """
        Args:
            generation: how images are made.
            denoiser: of its pipeline.
            partitions, patterns: the tables.
            exact: of `patterns`, what calls that a schedule does not cover run by.
            runner: of the segments of all patterns, for so many images at a time.
            prompts: in all blocks together.
        """
        self._generation, self._denoiser = generation, denoiser
        self._partitions, self._patterns, self._exact = tuple(partitions), tuple(patterns), exact
        self._runner, self._prompts = runner, prompts
        self._references: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def psnr(self, trial: Trial, model: ModelInfo) -> list[float]:
        """PSNR per prompt of one schedule, dB; `model` is for the plan that is simulated."""
        decode = decoder_of(self._generation.pipe, self._generation.options)
        plan = Plan(
            model=model, ranks=(RankSpec(device="cpu"),) * self._exact.world_size, partitions=self._partitions,
            patterns=self._patterns, exact=self._exact.name, schedule=FixedSchedule(steps=trial.steps),
        )
        runners = {len(batch.prompts): self._runner(len(batch.prompts)) for batch in trial.block}
        simulator = Simulator(plan, self._denoiser, runners=runners)
        values: list[float] = []
        for batch in trial.block:
            resumed = Resumed(simulator, batch.pairs)
            final = self._generation.latents(batch.prompts, resumed, batch.first)
            values += [min(value, MAX_PSNR_DB) for value in psnr(decode(final), self._reference(batch, decode))]
        return values

    def _reference(self, batch: Batch, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """The exact images of a batch, decoded once where they do not take much memory."""
        key = (batch.first, len(batch.prompts))
        if key in self._references:
            return self._references[key]
        images = decode(batch.final.to(next(self._denoiser.parameters()).device))
        if images[0].nbytes * self._prompts <= KEPT_BYTES:
            self._references[key] = images
        return images


def work_of(patterns: Mapping[str, Pattern], trial: Trial) -> float:
    """Evaluations of the denoiser for one branch that a trial takes."""
    computed = trial.steps[len(trial.block[0].pairs) :]
    return sum(len(patterns[name].units) / patterns[name].stages for name in computed)
