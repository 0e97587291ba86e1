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
from .pattern import Pattern
from .provenance import ModelInfo, Provenance
from .step_errors import ErrorSampling, PatternErrors

__all__ = ["Profile"]


class Profile(Document):
    """Measured costs, discrepancy curves and pattern errors of one denoiser in one pipeline configuration."""

    kind: Literal["profile"] = "profile"
    schema_version: Literal[1] = 1
    model: ModelInfo
    graph: LayerGraph
    costs: Costs
    num_steps: int = Field(ge=1)
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
        known = {pattern.name for pattern in self.patterns}
        for errors in self.errors:
            if errors.pattern not in known:
                raise ValueError(f"errors of unknown pattern {errors.pattern!r}; patterns are {sorted(known)}")
            for curve in errors.curves:
                if len(curve.rmse) != self.num_steps or len({len(row) for row in curve.rmse}) != 1:
                    raise ValueError(
                        f"error curve of {errors.pattern!r} must have {self.num_steps} rows of equal length"
                    )
        if self.noise_levels and len(self.noise_levels) != self.num_steps:
            raise ValueError(f"noise_levels must have {self.num_steps} steps, got {len(self.noise_levels)}")
        curves = [] if self.guidance is None else [self.guidance]
        if any(len(row) != self.num_steps for each in (*curves, *self.further_guidance) for row in each.rel_mae):
            raise ValueError(f"guidance curves must have {self.num_steps} steps")
        for partition in self.partitions:
            partition.check_covers(self.graph)
        return self

    @cached_property
    def errors_by_pattern(self) -> dict[str, PatternErrors]:
        """Error curves by pattern name."""
        return {errors.pattern: errors for errors in self.errors}

    def partition(self, name: str) -> Partition:
        """The partition called `name` (`whole` included)."""
        whole = Partition.whole(self.graph)
        return next(p for p in (*self.partitions, whole) if p.name == name)
