"""How to use many GPUs: how many make one image together, and how many images are made side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..ir import InputError, Plan, Profile, TargetError, UsageError
from .queueing import simulate_queue
from .solve import plan
from .worlds import check_gpus

__all__ = ["OBJECTIVES", "Fleet", "FleetOption", "plan_fleet"]

Objective = Literal["throughput", "latency"]
OBJECTIVES: tuple[Objective, ...] = ("throughput", "latency")


@dataclass(frozen=True, kw_only=True)
class FleetOption:
    """One way to divide the GPUs."""

    gpus_per_image: int
    images_at_once: int
    plan: Plan
    """Of one image."""
    latency_s: float
    """Predicted denoising loop of one image."""
    images_per_s: float
    """With every group busy; the denoising loop alone."""
    utilisation: float | None = None
    """Share of the groups that work on average, at the arrival rate; 1 or more is too little."""
    response_s: float | None = None
    """The percentile of the time from arrival to finished; None without an arrival rate, or when it is too high."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """All options and the best one."""

    gpus: int
    objective: Objective
    arrival_rate: float | None
    percentile: float
    options: tuple[FleetOption, ...]
    """By GPUs per image; those that cannot reach the target are left out."""
    best: FleetOption


def plan_fleet(
    profile: Profile, *, gpus: int, objective: str = "throughput", arrival_rate: float | None = None,
    percentile: float = 95.0, seed: int = 0, on_progress: Callable[[str, int, int], None] | None = None,
    **target: Any,
) -> Fleet:
    """Divide `gpus` GPUs into equal groups, each making one image at a time by the best plan for `target`.

    Considered are all group sizes that divide `gpus` (of two or more with weights of their own stages) and that the
    profile has partitions for. The objective `throughput` takes the most images per second, `latency` the shortest time
    of one image; with an arrival rate, `latency` takes the shortest `percentile` of the response time by queueing
    simulation (`queueing`), waiting included.

    Args:
        profile: measurements of one denoiser; links that were not measured are free.
        gpus: in all.
        objective: see above.
        arrival_rate: images asked for per second, at random times.
        percentile: of the response time.
        seed: of the simulated arrivals.
        on_progress: called with (stage, done, total).
        **target: arguments of `plan` for one image: `min_psnr` and so on.

    Raises:
        UsageError: an argument is out of range.
        TargetError: no group size reaches the target, or none keeps up with the arrivals.
        InputError: the profile lacks what every group size needs.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"got objective {objective!r}; choose from {', '.join(OBJECTIVES)}")
    if not 0 < percentile < 100:
        raise UsageError(f"got percentile={percentile:g}; give a number between 0 and 100, e.g. 95")
    if arrival_rate is not None and not arrival_rate > 0:
        raise UsageError(f"got arrival_rate={arrival_rate:g}; give images per second above 0")
    check_gpus(gpus)
    least = min(gpus, 2) if target.get("weights") == "stages" else 1
    sizes = [size for size in range(least, gpus + 1) if gpus % size == 0]
    options: list[FleetOption] = []
    refused: list[InputError] = []
    for done, size in enumerate(sizes):
        if on_progress is not None:
            on_progress("GPUs per image", done, len(sizes))
        try:
            made = plan(profile, gpus=size, **target)
        except UsageError:
            raise
        except InputError as error:  # out of reach, or the profile has no partition for so many
            refused.append(error)
            continue
        options.append(_option(made, size, gpus // size, arrival_rate, percentile, seed))
    if not options:
        raise next((error for error in reversed(refused) if isinstance(error, TargetError)), refused[-1])
    return Fleet(
        gpus=gpus, objective="latency" if objective == "latency" else "throughput", arrival_rate=arrival_rate,
        percentile=percentile, options=tuple(options), best=_best(options, objective, arrival_rate),
    )


def _option(
    made: Plan, size: int, groups: int, rate: float | None, percentile: float, seed: int
) -> FleetOption:
    latency = made.predictions.latency_s
    assert latency is not None, "plans that were just solved are predicted"
    load = None if rate is None else rate * latency / groups
    response = None
    if rate is not None and load is not None and load < 1:
        response = simulate_queue(latency, groups, rate, seed=seed).percentile_s(percentile)
    return FleetOption(
        gpus_per_image=size, images_at_once=groups, plan=made, latency_s=latency, images_per_s=groups / latency,
        utilisation=load, response_s=response,
    )


def _best(options: list[FleetOption], objective: str, rate: float | None) -> FleetOption:
    if objective == "throughput":
        best = max(options, key=lambda option: (option.images_per_s, -option.latency_s))
        if rate is None or best.response_s is not None:
            return best
    elif rate is None:
        return min(options, key=lambda option: option.latency_s)
    steady = [(option.response_s, option) for option in options if option.response_s is not None]
    if not steady:
        most = max(options, key=lambda option: option.images_per_s)
        raise TargetError(
            f"{rate:g} images/s are more than these GPUs can make: the most is {most.images_per_s:.3g} images/s with "
            f"{most.gpus_per_image} per image; ask for fewer, use more GPUs, or lower the quality"
        )
    return min(steady, key=lambda pair: pair[0])[1]
