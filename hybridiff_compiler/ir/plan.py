"""Plans: the tables that the runtime executes, with everything needed to check that they fit."""

from __future__ import annotations

from functools import cached_property
from typing import Literal, Self

from pydantic import Field, model_validator

from .ages import check_reads
from .data import Data, Document
from .errors import InputError
from .partition import Partition
from .pattern import Pattern, check_tables
from .provenance import ModelInfo
from .schedule import FixedSchedule, Schedule, SwitchedSchedule
from .segment import lower

__all__ = ["Certificate", "Plan", "PlanProvenance", "Predictions", "RankSpec"]


class RankSpec(Data):
    """One rank of a plan."""

    device: Literal["cpu", "cuda"]
    speed: float = Field(default=1.0, gt=0)
    """How fast it computes, relative to the device that the profile was measured on."""
    memory_bytes: int | None = Field(default=None, gt=0)
    """What parameters and activations may take up; null: no limit."""


class Predictions(Data):
    """What the planner expects; null where the profile does not allow a prediction."""

    latency_s: float | None = None
    """Denoising loop of one image: computation, exposed communication and per-step overhead."""
    single_s: float | None = None
    """The same loop on one rank, both branches batched."""
    speedup: float | None = None
    """`single_s / latency_s`."""
    ideal_speedup: float | None = None
    """Measured stage times alone: no communication, no overhead on either side."""
    work_speedup: float | None = None
    """Independent of hardware: denoiser evaluations on the critical path, one rank's two per step over the plan's;
    a stage counts by its share of the layers' time."""
    psnr_db: float | None = None
    """Mean over prompts, against the exact run of the same seed; null for exact plans."""
    quantile: float | None = None
    """Share of prompts that may fall below `psnr_quantile_db`."""
    psnr_quantile_db: float | None = None
    """That quantile of the PSNR over prompts; null where none was asked for."""
    target: str = ""
    """What was asked for, e.g. `min_psnr=35`."""
    peak_bytes: tuple[int, ...] = ()
    """Per rank, the most memory that the tensors of its part of the denoiser take (one image per call): parameters,
    graphs, what is kept and sent. Without what the allocator rounds up or cannot use again, without libraries and the
    device's context, and on rank 0 without the other parts of the pipeline. Empty: not predicted."""


class Certificate(Data):
    """How close to optimal a solved schedule is proven to be, over all schedules of the candidate patterns."""

    objective: Literal["latency_s", "error"]
    """What was minimised: predicted seconds under an error budget, or summed step error under a latency budget."""
    value: float
    """What the schedule reaches."""
    lower_bound: float
    """No schedule within the same budget does better."""
    states: int = Field(ge=1)
    """States of the age automaton that was searched."""
    labels: int = Field(ge=1)
    """Pairs of state and latency that the search kept, over all steps."""
    simplified: bool = False
    """Whether the search merged ages (on the cautious side); the bound holds without."""
    over: Literal["all", "undominated", "relaxed"] = "all"
    """What the bound holds for: all schedules of the candidate patterns, those of the patterns that no other beats at
    every step and age, or (loosely) all schedules with ages taken as young as they can be."""

    @property
    def gap(self) -> float:
        """`value - lower_bound` relative to the bound; 0 when the schedule is proven optimal."""
        excess = max(0.0, self.value - self.lower_bound)
        return excess / self.lower_bound if self.lower_bound > 0 else (0.0 if excess <= 0 else float("inf"))


class PlanProvenance(Data):
    """Where a plan comes from."""

    created: str
    profile_sha256: str
    versions: dict[str, str]


class Plan(Document):
    """Partitions, patterns and a schedule for one denoiser at one call signature on given ranks."""

    kind: Literal["plan"] = "plan"
    schema_version: Literal[1] = 1
    model: ModelInfo
    ranks: tuple[RankSpec, ...] = Field(min_length=1)
    partitions: tuple[Partition, ...] = ()
    patterns: tuple[Pattern, ...] = Field(min_length=1)
    weights: Literal["whole", "stages"] = "whole"
    """Whether every rank holds the whole denoiser, or only the parameters of the stages that it evaluates in some of
    the patterns, for models that do not fit one device; calls that the plan does not cover are refused then."""
    exact: str
    """Name of the exact pattern for generations that the schedule does not cover (another number of steps)."""
    schedule: Schedule
    predictions: Predictions = Predictions()
    certificate: Certificate | None = None
    """Of solved schedules; null for policies, hand-made plans and those of older versions."""
    provenance: PlanProvenance | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [pattern.name for pattern in self.patterns]
        check_tables(self.partitions, self.patterns, "plan")
        for pattern in self.patterns:
            if pattern.world_size > len(self.ranks):
                raise ValueError(
                    f"pattern {pattern.name!r} needs {pattern.world_size} ranks, the plan has {len(self.ranks)}"
                )
            try:
                lower(pattern)
            except InputError as error:
                raise ValueError(str(error)) from None
        unknown = sorted({*self.schedule.patterns, self.exact} - set(names))
        if unknown:
            raise ValueError(f"schedule names unknown patterns {unknown}; the plan has {names}")
        if not self.pattern(self.exact).is_exact:
            raise ValueError(f"pattern {self.exact!r} is named as the exact one, but its table is not exact")
        for schedule in self.schedule.possible():
            try:
                check_reads([self.pattern(name) for name in schedule.steps])
            except InputError as error:
                raise ValueError(str(error)) from None
        if isinstance(self.schedule, SwitchedSchedule):
            for step, name in enumerate(self.schedule.undecided.steps[: self.schedule.measured]):
                if not self.pattern(name).is_exact:
                    raise ValueError(
                        f"step {step} runs {name!r}, but the discrepancy of the first {self.schedule.measured} steps "
                        "is measured, for which they must be exact"
                    )
        return self

    @cached_property
    def _patterns_by_name(self) -> dict[str, Pattern]:
        return {pattern.name: pattern for pattern in self.patterns}

    def pattern(self, name: str) -> Pattern:
        """The pattern called `name`."""
        return self._patterns_by_name[name]

    @property
    def num_steps(self) -> int:
        """Denoiser calls (with both branches) of one generation that the schedule covers."""
        return self.schedule.num_steps

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def idle_ranks(self) -> tuple[int, ...]:
        """Ranks that compute nothing in any step that can occur."""
        busy = {unit.rank for name in self.schedule.patterns for unit in self.pattern(name).units}
        return tuple(rank for rank in range(self.world_size) if rank not in busy)

    @property
    def is_exact(self) -> bool:
        """Whether every step that can occur is exact."""
        return all(self.pattern(name).is_exact for name in self.schedule.patterns)

    def with_steps(self, steps: tuple[str, ...]) -> Plan:
        """The same tables with another fixed schedule (validated anew, predictions dropped)."""
        fields = dict(self)
        return Plan(**(fields | {
            "schedule": FixedSchedule(steps=steps), "predictions": Predictions(), "certificate": None,
        }))
