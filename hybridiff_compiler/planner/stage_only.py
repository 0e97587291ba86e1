"""Patterns for models that do not fit one rank: stage s of one linear split on rank s, in every step.

The exact one is a *relay*: rank 0 computes its stage of the unconditional branch and passes it on, and the next rank
goes on with it while rank 0 computes its stage of the conditional branch. So ranks are idle only while the first branch
comes in and the last one goes out: of `n` ranks with equal stages each works 2 of `n + 1` stage times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from ..ir import BRANCHES, Combine, InputError, Partition, Pattern, Profile, Read, Unit

__all__ = ["WEIGHTS", "Weights", "on_own_stages", "relay_pattern", "stage_partition"]

Weights = Literal["whole", "stages"]
WEIGHTS: tuple[Weights, ...] = ("whole", "stages")
"""Whether every rank holds the whole denoiser, or the parameters of its stages only."""


def stage_partition(profile: Profile, gpus: int) -> Partition:
    """The profile's partition with one stage per rank whose stages read nothing of later ones.

    Raises:
        InputError: it has none.
    """
    for partition in profile.partitions:
        if len(partition.stages) == gpus and not partition.is_nested(profile.graph):
            return partition
    counts = sorted({len(p.stages) for p in profile.partitions if p.name.startswith("linear")})
    raise InputError(
        f"weights='stages' on {gpus} ranks needs a linear split into {gpus} stages; this profile has some into "
        f"{', '.join(map(str, counts)) or 'none'}; choose as many ranks, or profile again for {gpus} GPUs"
    )


def relay_pattern(partition: Partition) -> Pattern:
    """The exact step on a partition that `stage_partition` gave."""
    stages = len(partition.stages)
    units = [
        Unit(branch=branch, stage=stage, rank=stage, reads=tuple(
            Read(stage=later, branch=branch, stale=False, nothing=True) for later in range(stage + 1, stages)))
        for stage in range(stages) for branch in BRANCHES
    ]
    return Pattern(
        name=f"relay:{partition.name}", partition=partition.name, stages=stages, units=tuple(units),
        combine=Combine.CFG,
    )


def on_own_stages(patterns: Iterable[Pattern], partition: Partition) -> tuple[Pattern, ...]:
    """Those of `patterns` that compute nothing, or stages of `partition`, each then on its own rank."""
    return tuple(
        pattern.model_copy(update={
            "units": tuple(unit.model_copy(update={"rank": unit.stage}) for unit in pattern.units)
        })
        for pattern in patterns
        if not pattern.is_exact and (pattern.partition == partition.name or not pattern.units)
    )
