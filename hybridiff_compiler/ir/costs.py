"""The times of a profile: layers, stage graphs, links, and how they were measured."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from .data import Data

__all__ = ["Broadcast", "Costs", "LayerTiming", "Link", "StageCost"]

Seconds = Annotated[float, Field(ge=0)]


class StageCost(Data):
    """Measured time of one segment graph."""

    partition: str
    stages: tuple[int, ...]
    batch: int = Field(ge=1)
    """Branches evaluated together."""
    seconds: float = Field(gt=0)
    spread: float = Field(default=0.0, ge=0)
    """Relative inter-quartile range over the repeats, or the distance between two moments of timing if larger, with the
    drift of the machine during the session if that was watched: what another measurement may well differ by."""


class Link(Data):
    """Alpha-beta model of one direction between two ranks: `latency_s + nbytes / bytes_per_s`."""

    source: int = Field(ge=0)
    target: int = Field(ge=0)
    latency_s: float = Field(ge=0)
    bytes_per_s: float = Field(gt=0)
    spread: float = Field(default=0.0, ge=0)
    """Relative inter-quartile range of repeated messages, median over the message sizes."""
    residual: float = Field(default=0.0, ge=0)
    """Relative distance of the measured times from the model, median over the message sizes."""
    points: tuple[tuple[int, float], ...] = ()
    """What was fitted: (bytes, median seconds)."""

    def seconds(self, nbytes: int) -> float:
        """Predicted time of one message."""
        return self.latency_s + nbytes / self.bytes_per_s


class Broadcast(Data):
    """Alpha-beta model of one rank giving all `ranks` ranks the same bytes, until the last one has them."""

    root: int = Field(ge=0)
    ranks: int = Field(ge=2)
    latency_s: float = Field(ge=0)
    bytes_per_s: float = Field(gt=0)
    spread: float = Field(default=0.0, ge=0)
    """As in `Link`."""
    residual: float = Field(default=0.0, ge=0)
    """As in `Link`."""
    points: tuple[tuple[int, float], ...] = ()
    """As in `Link`."""


class LayerTiming(Data):
    """How layer times were measured, and how far to trust them."""

    method: Literal["wall", "graph", "compiled", "eager-graph", "roofline"]
    """`wall`: wall time inside the running whole (CPU). `graph`, `compiled`: events between layers inside one CUDA
    graph of the whole, uncompiled or compiled. `eager-graph`: as `graph`, taken as shares of the compiled whole.
    `roofline`: estimated from arithmetic and bytes."""
    spread: dict[int, tuple[float, ...]] = Field(default={})
    """Per batch and layer, as that of a stage."""
    whole_s: dict[int, float] = Field(default={})
    """Per batch: seconds of the whole, to which the layers' sum is scaled."""
    raw_sum: dict[int, float] = Field(default={})
    """Per batch: sum of the layers before that scaling, over `whole_s` (1: nothing to correct)."""
    stage_residual: float | None = Field(default=None, ge=0)
    """Largest relative distance between a measured stage and the sum of its layers, before the layers were fitted to
    the stages."""
    fitted_residual: float | None = Field(default=None, ge=0)
    """The same after the fit."""
    rounds: int = Field(default=0, ge=0)
    """How often partitions were solved for and their stages measured until they stopped moving."""
    settled: bool | None = None
    """Whether they stopped."""
    missing: tuple[str, ...] = ()
    """What was not measured because the time was over: sums of layers stand in for stages, and layers of the uncompiled
    whole for those of the compiled one."""


class Costs(Data):
    """Times in seconds."""

    layers: dict[int, tuple[Seconds, ...]] = Field(min_length=1)
    """Per number of branches batched together (1, 2): time of each layer, in graph order, calibrated so that their
    sum is the time of the whole."""
    stages: tuple[StageCost, ...] = ()
    """Re-measured segment graphs; preferred over the sum of layers."""
    step_overhead_s: float = Field(default=0.0, ge=0)
    """Pipeline work per step outside the denoiser (scheduler, guidance arithmetic), on the driver."""
    links: tuple[Link, ...] = ()
    """One per ordered pair of ranks: the two directions may differ."""
    broadcasts: tuple[Broadcast, ...] = ()
    """One per root."""
    transport: Literal["", "gloo", "nccl"] = ""
    """What the links were measured over; empty: not measured."""
    timing: LayerTiming | None = None
    """How `layers` came about; None in profiles from before this was noted."""

    def with_drift(self, drift: float) -> Costs:
        """With relative spreads of layers and stages that cover an independent `drift` of everything, too."""
        timing = self.timing
        if timing is not None:
            timing = timing.model_copy(update={"spread": {
                batch: tuple(float(f"{math.hypot(spread, drift):.3g}") for spread in row)
                for batch, row in timing.spread.items()
            }})
        stages = tuple(
            cost.model_copy(update={"spread": math.hypot(cost.spread, drift)}) for cost in self.stages
        )
        return self.model_copy(update={"stages": stages, "timing": timing})

    def stage_seconds(self, partition: str, stages: tuple[int, ...], batch: int) -> float | None:
        """Measured time of a segment, or None when it was not measured."""
        for cost in self.stages:
            if (cost.partition, cost.stages, cost.batch) == (partition, stages, batch):
                return cost.seconds
        return None
