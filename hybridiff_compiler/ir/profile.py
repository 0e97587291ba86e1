"""Profiles: everything measured once about a denoiser, from which any number of plans are solved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from .data import Data, Document
from .layers import LayerGraph
from .partition import Partition
from .pattern import Pattern
from .signature import CallSignature

__all__ = [
    "Broadcast", "Compounding", "Costs", "ErrorCurve", "Guidance", "LayerTiming", "Link", "ModelInfo", "PatternErrors",
    "Profile", "Provenance", "Redundancy", "ScheduleCheck", "StageCost", "at_gap",
]


class ModelInfo(Data):
    """Which denoiser a profile or plan belongs to."""

    name: str
    """As the user named it; for display."""
    denoiser: str
    """Class name of the denoiser."""
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    """`LayerGraph.fingerprint` at the branch batch size: layers, values and shapes."""
    parameter_bytes: int = Field(ge=0)
    dtype: str
    signature: CallSignature
    """One branch's call (batch of one image)."""


class Provenance(Data):
    """Where measurements come from."""

    created: str
    """UTC, ISO 8601."""
    device: str
    """Device name as the vendor reports it, or the CPU model."""
    device_type: Literal["cpu", "cuda"] = "cpu"
    backend: str
    threads: int | None = None
    """CPU threads per rank; null on GPUs."""
    versions: dict[str, str]
    seed: int
    prompts: int
    prompts_sha256: str
    random_weights: bool = False
    """True when latency only is meaningful."""
    estimated: str | None = None
    """Null for measurements; otherwise how the times were estimated for `device`, which was not at hand."""
    clocks_mhz: dict[str, int] = Field(default={})
    """Clocks of the device by domain (`sm`, `sm_max`, `memory`), where its driver tells."""


class StageCost(Data):
    """Measured time of one segment graph."""

    partition: str
    stages: tuple[int, ...]
    batch: int = Field(ge=1)
    """Branches evaluated together."""
    seconds: float = Field(gt=0)
    spread: float = Field(default=0.0, ge=0)
    """Relative inter-quartile range over the repeats, or the distance between two moments of the session if larger."""


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
    """Per batch and layer: relative inter-quartile range over the repeats."""
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

    layers: dict[int, tuple[float, ...]]
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

    def with_spread(self, least: float) -> Costs:
        """With relative spreads of layers and stages of at least `least`."""
        timing = self.timing
        if timing is not None:
            timing = timing.model_copy(update={"spread": {
                batch: tuple(max(spread, least) for spread in row) for batch, row in timing.spread.items()
            }})
        stages = tuple(cost.model_copy(update={"spread": max(cost.spread, least)}) for cost in self.stages)
        return self.model_copy(update={"stages": stages, "timing": timing})

    def stage_seconds(self, partition: str, stages: tuple[int, ...], batch: int) -> float | None:
        """Measured time of a segment, or None when it was not measured."""
        for cost in self.stages:
            if (cost.partition, cost.stages, cost.batch) == (partition, stages, batch):
                return cost.seconds
        return None


class Guidance(Data):
    """Denoising discrepancy m_i = mean|eps_c - eps_u| / mean|eps_u| of every step (METHOD.md, "rel-MAE")."""

    rel_mae: tuple[tuple[float, ...], ...]
    """Per prompt, per step."""
    scale: float | None = None
    """Guidance scale of the generations; None: that of the profile."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean over prompts, per step."""
        return tuple(sum(column) / len(column) for column in zip(*self.rel_mae))

    def quantile(self, share: float) -> tuple[float, ...]:
        """Per step, the value that `share` of the prompts (0 to 1) do not exceed, interpolated linearly."""
        result = []
        for column in zip(*self.rel_mae):
            ordered = sorted(column)
            position = share * (len(ordered) - 1)
            low = min(int(position), len(ordered) - 1)
            high = min(low + 1, len(ordered) - 1)
            result.append(ordered[low] + (position - low) * (ordered[high] - ordered[low]))
        return tuple(result)

    @property
    def curvature(self) -> tuple[float, ...]:
        """Second difference `m[i+1] - 2 m[i] + m[i-1]` of the mean, per step; 0 at both ends."""
        mean = self.mean
        inner = [mean[i + 1] - 2 * mean[i] + mean[i - 1] for i in range(1, len(mean) - 1)]
        return (0.0, *inner, 0.0)[: len(mean)]

    def tau1(self, history: int, eps: float, cap: int) -> tuple[int, ...]:
        """Per prompt, the step at which the discrepancy has flattened (METHOD.md, "Switching rule").

        Args:
            history: L, how many steps the slope spans.
            eps: slope under which the curve counts as flat.
            cap: the result when that does not happen before step `cap`.
        """
        return tuple(_flattened(curve, history, eps, cap) for curve in self.rel_mae)


def _flattened(curve: tuple[float, ...], history: int, eps: float, cap: int) -> int:
    for step in range(history, min(len(curve), cap)):
        if 0 <= (curve[step - history + 1] - curve[step]) / history < eps:
            return step
    return cap


class Redundancy(Data):
    """Temporal redundancy: how much the values that partitions cut change from step to step."""

    change: dict[str, tuple[float, ...]]
    """Per value, per step from the second on: mean |value - its value a step before| over the mean |value| of the step
    before, over all prompts and both branches."""

    @property
    def mean(self) -> dict[str, float]:
        """Mean over steps by value: what a cut there costs in staleness. Small values tolerate it."""
        return {name: sum(row) / len(row) for name, row in self.change.items() if row}


Source = Literal["activations", "memory", "none"]


class ErrorCurve(Data):
    """Image error caused by running one step so, by step and age of what the pattern takes from earlier steps."""

    source: Source
    """What ages: stale stage activations, the remembered estimates (`delta`, `last`), or nothing."""
    gap: int | None = Field(default=None, ge=1)
    """Of patterns with a trend: steps between the two exact ones that the line is drawn through. They have a curve per
    measured gap; the others none."""
    rmse: tuple[tuple[float, ...], ...]
    """`rmse[step][age - 1]`: root mean square error of the final image (values in [0, 1]), geometric mean over
    prompts. Source `none` has one column."""

    @property
    def max_age(self) -> int:
        """Largest age that was measured."""
        return len(self.rmse[0])


class PatternErrors(Data):
    """Error curves of one pattern; the error of a step is the sum over its sources (of a trend, at its gap)."""

    pattern: str
    curves: tuple[ErrorCurve, ...] = Field(min_length=1)


def at_gap(curves: Sequence[ErrorCurve], gap: int) -> tuple[ErrorCurve, ...]:
    """The curves that hold at a gap of a trend: those without one, and of the others the ones measured at the least gap
    that is not smaller. None of those where the gap is larger than all that were measured."""
    measured = [curve.gap for curve in curves if curve.gap is not None and curve.gap >= gap]
    if not measured:
        return tuple(curve for curve in curves if curve.gap is None)
    return tuple(curve for curve in curves if curve.gap in (None, min(measured)))


class ErrorSampling(Data):
    """How finely errors were measured; what lies between was interpolated."""

    prompts: int = Field(ge=1)
    """Prompts whose errors by step and age were measured (all of the profile's were used for whole schedules)."""
    probes: int = Field(ge=1)
    """Random image directions per prompt."""
    measured_steps: int = Field(ge=1)
    """Steps at which errors were measured."""
    ages: tuple[int, ...]
    """Ages that were measured."""
    estimator_db: float = Field(ge=0)
    """Standard error of a single value, from the number of prompts and probes."""
    weights: dict[str, float] = Field(default={})
    """By kind of error (combination of estimates / what ages), the factor by which whole schedules corrected the
    curves; applied to them already."""


_ONE_SIDED_95 = 1.645
"""Standard errors of a normal distribution below which it falls with a probability of 5 %."""


class ScheduleCheck(Data):
    """A schedule measured whole, and what a fit to other schedules on other prompts had predicted for it."""

    kind: str
    """`solved`: from the planner's frontier; `random`: drawn."""
    raw_db: float
    """`-20 log10` of its summed error."""
    predicted_db: float
    """Mean PSNR predicted by a fit that saw neither this schedule nor its prompts."""
    measured_db: float
    """Mean PSNR over its prompts."""
    std_db: float = Field(ge=0)
    """Standard deviation of the PSNR over its prompts."""
    prompts: int = Field(ge=1)


class Compounding(Data):
    """How summed single-step errors turn into the PSNR of a whole schedule, as measured on schedules.

    Errors add up almost coherently, so the PSNR follows `-20 log10(sum of rmse)` (the *raw* value) with an offset that
    changes slowly: a monotone curve through measured points, straight between them, of slope one beyond them.
    """

    knots: tuple[tuple[float, float], ...] = ()
    """(raw dB, mean PSNR in dB), both strictly increasing; empty: the PSNR is the raw value."""
    residual_db: float = Field(default=0.0, ge=0)
    """Root mean square of the distances of solved schedules from the curve, each left out of its own fit."""
    prompt_std_db: float = Field(default=0.0, ge=0)
    """Standard deviation of the PSNR over prompts, mean over the measured schedules."""
    prompts: int = Field(default=0, ge=0)
    """Number of prompts that each schedule was measured on."""
    schedules: int = Field(default=0, ge=0)
    """Number of schedules measured for the fit."""
    checks: tuple[ScheduleCheck, ...] = ()
    """Cross-validation on unseen schedules and unseen prompts; empty when there were too few of them."""

    def mean_error_db(self, kind: str | None = None) -> float | None:
        """Mean absolute difference between prediction and measurement in the cross-validation (of one kind of
        schedules): the error bar of a predicted mean over `checks[..].prompts` unseen prompts. None without checks."""
        misses = [abs(c.measured_db - c.predicted_db) for c in self.checks if kind in (None, c.kind)]
        return sum(misses) / len(misses) if misses else None

    @property
    def bias_db(self) -> float | None:
        """Mean of measurement less prediction in the cross-validation; None without checks."""
        misses = [check.measured_db - check.predicted_db for check in self.checks]
        return sum(misses) / len(misses) if misses else None

    @field_validator("knots")
    @classmethod
    def _increasing(cls, knots: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        if any(b[0] <= a[0] or b[1] <= a[1] for a, b in pairwise(knots)):
            raise ValueError(f"knots must increase in both coordinates, got {knots}")
        return knots

    def psnr_db(self, error: float) -> float:
        """Predicted mean PSNR of a schedule whose step errors sum to `error`; infinite for 0."""
        if error <= 0:
            return math.inf
        raw = -20 * math.log10(error)
        if not self.knots:
            return raw
        (first, first_db), (last, last_db) = self.knots[0], self.knots[-1]
        if raw <= first:
            return first_db + (raw - first)
        for (left, left_db), (right, right_db) in pairwise(self.knots):
            if raw <= right:
                return left_db + (raw - left) * (right_db - left_db) / (right - left)
        return last_db + (raw - last)

    @property
    def reserve_db(self) -> float:
        """What the planner keeps in reserve for the mean over equally many other prompts: the one-sided 95 % bound of
        the difference between prediction and measurement, from the curve's residuals and two samples of prompts."""
        sampling = self.prompt_std_db * math.sqrt(2 / self.prompts) if self.prompts else 0.0
        return _ONE_SIDED_95 * math.hypot(self.residual_db, sampling)


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
