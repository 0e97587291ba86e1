"""Profiles: everything measured once about a denoiser, from which any number of plans are solved."""

from __future__ import annotations

from functools import cached_property
from typing import Literal, Self

from pydantic import Field, model_validator

from .compounding import Compounding
from .costs import Costs
from .curves import Guidance, Redundancy
from .data import Document
from .layers import LayerGraph
from .partition import Partition
from .pattern import Pattern, check_tables
from .provenance import ModelInfo, Provenance
from .schedule import MAX_STEPS
from .step_errors import ErrorSampling, PatternErrors

__all__ = ["Profile"]


class Profile(Document):
    """Measured costs, discrepancy curves and pattern errors of one denoiser in one pipeline configuration."""

    kind: Literal["profile"] = "profile"
    schema_version: Literal[1] = 1
    model: ModelInfo
    graph: LayerGraph
    costs: Costs
    num_steps: int = Field(ge=1, le=MAX_STEPS)
    scheduler: str
    guidance_scale: float
    noise_levels: tuple[float, ...] = ()
    """Timestep of every step over the scheduler's `num_train_timesteps` (1: pure noise, towards 0: the image); empty
    in profiles that did not record it."""
    guidance: Guidance | None = None
    further_guidance: tuple[Guidance, ...] = ()
    """At further guidance scales."""
    redundancy: Redundancy | None = None
    partitions: tuple[Partition, ...] = ()
    patterns: tuple[Pattern, ...] = ()
    """Tables whose errors were measured; ranks in them are placeholders of the two-rank case."""
    errors: tuple[PatternErrors, ...] = ()
    sampling: ErrorSampling | None = None
    """How the errors were measured; None in profiles from before this was noted."""
    compounding: Compounding = Compounding()
    provenance: Provenance
    """Of the costs, and of the errors unless `errors_provenance` is given."""
    errors_provenance: Provenance | None = None
    """Of guidance curves, errors and compounding, when they were taken over from a profile made elsewhere."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for batch, seconds in self.costs.layers.items():
            if len(seconds) != len(self.graph.layers):
                raise ValueError(
                    f"costs of batch {batch} list {len(seconds)} layers, the graph has {len(self.graph.layers)}"
                )
            if not sum(seconds) > 0:
                raise ValueError(f"costs of batch {batch} say that no layer takes any time")
        for batch, row in ({} if self.costs.timing is None else self.costs.timing.spread).items():
            if len(row) != len(self.costs.layers.get(batch, ())):
                raise ValueError(f"costs.timing.spread of batch {batch} must have an entry for each layer of the costs")
        self._check_tables()
        self._check_curves()
        return self

    def _check_tables(self) -> None:
        judged = [each.pattern for each in self.errors]
        if len(judged) != len(set(judged)):
            raise ValueError(f"errors of pattern names must be unique, got {judged}")
        check_tables(self.partitions, self.patterns, "profile")
        for partition in self.partitions:
            partition.check_covers(self.graph)
        known = {pattern.name for pattern in self.patterns}
        for errors in self.errors:
            if errors.pattern not in known:
                raise ValueError(f"errors of unknown pattern {errors.pattern!r}; patterns are {sorted(known)}")

    def _check_curves(self) -> None:
        for errors in self.errors:
            for curve in errors.curves:
                if len(curve.rmse) != self.num_steps or len({len(row) for row in curve.rmse}) != 1 or not curve.rmse[0]:
                    raise ValueError(
                        f"error curve of {errors.pattern!r} must have {self.num_steps} rows of equal length"
                    )
        if self.noise_levels and len(self.noise_levels) != self.num_steps:
            raise ValueError(f"noise_levels must have {self.num_steps} steps, got {len(self.noise_levels)}")
        for guidance in (self.guidance, *self.further_guidance):
            if guidance is not None and {len(row) for row in guidance.rel_mae} != {self.num_steps}:
                raise ValueError(f"guidance curves must have {self.num_steps} steps, of one prompt or more")
        values = {value.name for value in self.graph.values}
        for name, row in ({} if self.redundancy is None else self.redundancy.change).items():
            if name not in values:
                raise ValueError(f"redundancy of {name!r}, which is no value of the graph")
            if len(row) != self.num_steps - 1:
                raise ValueError(f"redundancy of {name!r} must have {self.num_steps - 1} steps, got {len(row)}")

    @cached_property
    def errors_by_pattern(self) -> dict[str, PatternErrors]:
        """Error curves by pattern name."""
        return {errors.pattern: errors for errors in self.errors}

    def partition(self, name: str) -> Partition:
        """The partition called `name` (`whole` included)."""
        whole = Partition.whole(self.graph)
        return next(p for p in (*self.partitions, whole) if p.name == name)
