"""Cost without hardware: denoiser evaluations on the critical path of a step.

One unit is one branch through the whole denoiser, so a step on one rank costs 2, `branch` 1 and `reuse` 0; a stage
counts by its share of the layers' time, two branches batched count as two, and moving data is free. Speed-ups in these
units do not depend on how well a device batches or how fast its links are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..ir import Costs, InputError, Pattern, Profile
from .cost import step_cost

__all__ = ["in_work_units", "step_work", "work_speedup"]


def in_work_units(profile: Profile) -> Profile:
    """The profile with evaluations in place of seconds: whatever is planned with it is planned for work alone.

    Raises:
        InputError: the profile holds neither layer times nor operation counts.
    """
    weights: Sequence[float] = profile.costs.layers.get(1) or next(iter(profile.costs.layers.values()), ())
    if not math.fsum(weights) > 0:
        weights = [layer.flops for layer in profile.graph.layers]
    total = math.fsum(weights)
    if not total > 0:
        raise InputError("the profile has neither layer times nor operation counts; profile the model again")
    shares = tuple(weight / total for weight in weights)
    return profile.model_copy(update={"costs": Costs(layers={1: shares, 2: tuple(2 * share for share in shares)})})


def step_work(profile: Profile, pattern: Pattern) -> float:
    """Denoiser evaluations on the critical path of one step of `pattern`."""
    return step_cost(in_work_units(profile), pattern).ideal_s


def work_speedup(profile: Profile, steps: Sequence[Pattern], num_steps: int | None = None) -> float | None:
    """One rank's evaluations (two per step, of `num_steps` steps) over those of a schedule; None when it has none."""
    units = in_work_units(profile)
    each = {pattern.name: step_cost(units, pattern).ideal_s for pattern in {p.name: p for p in steps}.values()}
    spent = math.fsum(each[pattern.name] for pattern in steps)
    return 2 * (num_steps or len(steps)) / spent if spent > 0 else None
