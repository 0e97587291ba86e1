"""A generation as it is predicted to run: which rank computes what, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir import Plan, PlanMismatchError, Profile, Segment
from .cost import CostModel

__all__ = ["Forecast", "ForecastStep", "Span", "forecast"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """One graph launch; seconds since the generation began."""

    segment: Segment
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class ForecastStep:
    """One step; seconds since the generation began."""

    pattern: str
    start_s: float
    end_s: float
    spans: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A whole denoising loop."""

    ranks: int
    steps: tuple[ForecastStep, ...]

    @property
    def seconds(self) -> float:
        """Of the loop."""
        return self.steps[-1].end_s if self.steps else 0.0


def forecast(profile: Profile, plan: Plan, steps: Sequence[str]) -> Forecast:
    """When every graph of a generation runs, by the same model that the planner's latencies are of (`CostModel`).

    Args:
        profile: the times.
        plan: tables and ranks.
        steps: pattern names, one per step (of an adaptive schedule: what it resolves to).

    Raises:
        PlanMismatchError: the plan is for another denoiser.
        InputError: the profile has no times for a segment.
    """
    if profile.model.fingerprint != plan.model.fingerprint:
        raise PlanMismatchError(
            f"the plan is for {plan.model.name} (graph {plan.model.fingerprint[:12]}), the profile is of "
            f"{profile.model.name} (graph {profile.model.fingerprint[:12]}); give the profile that the plan is from"
        )
    known = {partition.name: partition for partition in plan.partitions}
    own = profile.model_copy(update={  # the plan's stages may have been cut for other ranks since
        "partitions": (*plan.partitions, *(p for p in profile.partitions if p.name not in known)),
        "costs": profile.costs.model_copy(update={"stages": tuple(
            cost for cost in profile.costs.stages
            if cost.partition not in known or known[cost.partition] in profile.partitions
        )}),
    })
    model, now, result = CostModel(own, plan.ranks), 0.0, list[ForecastStep]()
    for name in steps:
        pattern = plan.pattern(name)
        spans = tuple(
            Span(segment=launch.segment, start_s=now + launch.start_s, end_s=now + launch.end_s)
            for launch in model.launches(pattern)
        )
        end = now + model.step(pattern).latency_s
        result.append(ForecastStep(pattern=name, start_s=now, end_s=end, spans=spans))
        now = end
    return Forecast(ranks=plan.world_size, steps=tuple(result))
