"""Recording exact generations: what the denoiser got and gave at every step, and what each pattern would have given.

While an exact generation runs, every candidate pattern is evaluated with caches of the wanted ages, and the difference
of its guided estimate from the exact one is kept. That costs one cheap step per (step, pattern, age), never a finished
generation; segments that several patterns share are evaluated once.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..ir import BRANCHES, WHOLE, Branch, CallSignature, Combine, Pattern, Segment, UsageError, lower
from ..ir.step_errors import Source
from ..runtime.estimates import EstimateMemory
from ..runtime.intercept import GuidedCall
from ..runtime.schedule_state import discrepancy
from ..runtime.segments import SegmentRunner, Slot
from ..runtime.simulator import run_pattern
from .grid import FULL, GAPS, LONGEST_TREND, Grid

__all__ = ["Option", "Recorder", "Recording", "guided", "options_of"]

Pair = Mapping[Branch, Tensor]


@dataclass(frozen=True)
class Option:
    """One way to run a step whose error is wanted: a pattern, what ages in it, and by how much."""

    pattern: str
    source: Source
    age: int
    gap: int = 0
    """Of a pattern with a trend: steps between the two exact ones that it looks back to; else 0."""


@dataclass
class Recording:
    """Exact generations of P images, by step."""

    inputs: list[Mapping[Branch, Mapping[str, Tensor]]] = field(default_factory=list)
    pairs: list[dict[Branch, Tensor]] = field(default_factory=list)
    rel_mae: list[list[float]] = field(default_factory=list)
    """Per step, per image."""
    deviations: list[dict[Option, Tensor]] = field(default_factory=list)
    """Per step: guided estimate of the option minus the exact one, [P, ...]; options off the grid are absent."""
    changes: list[dict[str, float]] = field(default_factory=list)
    """Per step from the second on, per value that a pattern reads: mean |value - value of the step before| over mean
    |value of the step before|, both branches and all images together."""
    scheduler: Any = None
    """Copy of the scheduler as it was when denoising began."""


def guided(pair: Pair, scale: float) -> Tensor:
    """Classifier-free guidance, `u + scale (c - u)`."""
    return pair["uncond"] + scale * (pair["cond"] - pair["uncond"])


def options_of(patterns: Sequence[Pattern], ages: Sequence[int], gaps: Sequence[int] = GAPS) -> list[Option]:
    """Every (pattern, source, age, gap) to measure; patterns that are exact have none."""
    options: list[Option] = []
    for pattern in patterns:
        if pattern.is_exact:
            continue
        sources: list[Source] = []
        if any(read.stale for unit in pattern.units for read in unit.reads):
            sources.append("activations")
        if pattern.combine in (Combine.DELTA, Combine.LAST):
            sources.append("memory")
        for source in sources:
            options += [
                Option(pattern.name, source, age, gap) for gap in (gaps if pattern.trend else (0,)) for age in ages
                if not gap or age <= min(gap, LONGEST_TREND)
            ]
        if not sources:
            options.append(Option(pattern.name, "none", 1))
    return options


class Recorder:
    """A `StepHandler` that runs every step exactly and records; use one recorder for one generation."""

    def __init__(
        self,
        scheduler: Any,
        runner: SegmentRunner,
        patterns: Sequence[Pattern],
        options: Sequence[Option],
        guidance_scale: float,
        grid: Grid = FULL,
        on_step: Callable[[int, int], None] = lambda step, steps: None,
        wide: SegmentRunner | None = None,
    ) -> None:
        """
        Args:
            scheduler: called without arguments; gives the pipeline's scheduler object.
            runner: the segment graphs of `patterns` at the number of images that will be generated together.
            patterns: candidates, an exact one first that computes the branches one by one.
            options: what to measure.
            guidance_scale: g of the guided estimate.
            grid: at which steps which ages are measured.
            on_step: progress callback (step, number of steps).
            wide: the same graphs at a multiple of the number of images: so many ages are evaluated together.
        """
        self._wide = wide
        self._scheduler, self._runner, self._on_step = scheduler, runner, on_step
        self._patterns = {pattern.name: pattern for pattern in patterns}
        self._exact = patterns[0]
        self._options, self._guidance_scale, self._grid = options, guidance_scale, grid
        depth = max((option.age for option in options), default=0)
        self._values: deque[dict[Slot, Tensor]] = deque(maxlen=depth + 1)
        self._evaluated: dict[tuple[Segment, int], tuple[dict[Branch, Tensor], dict[Slot, Tensor]]] = {}
        self.recording = Recording()

    def start(self, num_steps: int, signature: CallSignature) -> bool:
        """See `StepHandler.start`."""
        if self.recording.pairs:
            raise UsageError("a recorder records one generation; make another one")
        self.recording.scheduler = copy.deepcopy(self._scheduler())
        return True

    @torch.no_grad()
    def step(self, call: GuidedCall) -> Mapping[Branch, Tensor]:
        """See `StepHandler.step`."""
        pair, values = run_pattern(self._runner, self._exact, call.inputs, {}, moment=call.moment)
        self._values.appendleft(values)
        record = self.recording
        record.inputs.append(call.inputs)
        record.pairs.append(pair)
        images = pair["uncond"].shape[0]
        each = [discrepancy({branch: pair[branch][i] for branch in BRANCHES}) for i in range(images)]
        record.rel_mae.append(torch.stack(each).tolist())
        if len(self._values) > 1:
            record.changes.append(_changes(values, self._values[1]))
        exact = guided(pair, self._guidance_scale)
        self._evaluated.clear()
        ages = {
            gap: self._grid.ages_at(call.step, call.num_steps, gap) for gap in {option.gap for option in self._options}
        }
        self._evaluate_ages(ages.get(0, ()), call)
        record.deviations.append(
            {option: guided(self._estimate(option, call), self._guidance_scale) - exact
             for option in self._options if option.age in ages[option.gap]}
        )
        self._evaluated.clear()
        self._on_step(call.step, call.num_steps)
        return pair

    def _estimate(self, option: Option, call: GuidedCall) -> Pair:
        """The pair that `option` gives at this step, everything that it does not age being exact."""
        pattern, pairs = self._patterns[option.pattern], self.recording.pairs
        memory = EstimateMemory()
        if option.source == "memory":
            for back in (option.age + option.gap, option.age)[0 if option.gap else 1 :]:
                memory.preset(pairs[-1 - back], call.step - back)
            return memory.pair(pattern, {b: pairs[-1][b] for b in pattern.estimated_branches}, call.step)
        memory.preset(pairs[-1])
        age = option.age if option.source == "activations" else 0
        return memory.pair(pattern, self._evaluate(pattern, age, call), call.step)

    def _evaluate_ages(self, ages: Sequence[int], call: GuidedCall) -> None:
        """Evaluate the segments that read nothing but stale values at all `ages` together, if `wide` is so wide."""
        images, count = self.recording.pairs[-1]["uncond"].shape[0], len(ages)
        if self._wide is None or count < 2 or self._wide.estimate_spec[0][0] != count * images:
            return
        inputs = {
            branch: {
                path: torch.cat([leaf] * count) if leaf.dim() and leaf.shape[0] == images else leaf
                for path, leaf in call.inputs[branch].items()
            } for branch in BRANCHES
        }
        joined: dict[Slot, Tensor] = {}
        names = dict.fromkeys(option.pattern for option in self._options if option.source == "activations")
        for segment in dict.fromkeys(replace(each, rank=0) for name in names for each in lower(self._patterns[name])):
            reads = () if segment.partition == WHOLE else self._runner.values_read(segment)
            if not reads or not all(read.stale for read in reads):
                continue
            for read in reads:
                if read.source not in joined:
                    joined[read.source] = torch.cat([self._values[age][read.source] for age in ages])
            estimates, new = self._wide.run(segment, inputs, joined, moment=call.moment)
            for number, age in enumerate(ages):
                part = slice(number * images, (number + 1) * images)
                self._evaluated[segment, age] = (
                    {branch: estimate[part] for branch, estimate in estimates.items()},
                    {slot: value[part] for slot, value in new.items()},
                )

    def _evaluate(self, pattern: Pattern, age: int, call: GuidedCall) -> dict[Branch, Tensor]:
        """The estimates that `pattern` computes when everything it reads stale is `age` steps old."""
        computed: dict[Branch, Tensor] = {}
        written: dict[Slot, Tensor] = {}
        for segment in lower(pattern):
            if segment.partition == WHOLE:  # reads nothing from outside, so it computes what the exact step has
                computed.update({branch: self.recording.pairs[-1][branch] for branch in segment.branches})
                continue
            reads = self._runner.values_read(segment)
            if all(read.stale for read in reads):  # patterns that have such a segment in common share its evaluation
                key = (replace(segment, rank=0), age)
                if key not in self._evaluated:
                    taken = {read.source: self._values[age][read.source] for read in reads}
                    self._evaluated[key] = self._runner.run(segment, call.inputs, taken, moment=call.moment)
                estimates, new = self._evaluated[key]
            else:
                taken = {r.source: (self._values[age] if r.stale else written)[r.source] for r in reads}
                estimates, new = self._runner.run(segment, call.inputs, taken, moment=call.moment)
            computed.update(estimates)
            written.update(new)
        return computed


def _changes(values: Mapping[Slot, Tensor], before: Mapping[Slot, Tensor]) -> dict[str, float]:
    """Relative change of every value between two steps, all branches together."""
    moved: dict[str, Tensor] = {}
    size: dict[str, Tensor] = {}
    for slot, value in values.items():
        previous = before[slot].float()
        name = slot[1]
        moved[name] = moved.get(name, 0) + (value.float() - previous).abs().mean()
        size[name] = size.get(name, 0) + previous.abs().mean()
    names = list(moved)
    if not names:
        return {}
    ratios = torch.stack([moved[name] for name in names]) / torch.stack([size[name] for name in names]).clamp_min(1e-30)
    return dict(zip(names, ratios.tolist()))
