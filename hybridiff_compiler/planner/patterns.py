"""The tables a plan may choose from, generated from the partitions and the number of ranks.

A *family* is one idea for running a step, written as a table of a two-stage (or whole) denoiser on two ranks. Its
table is made for every partition that suits it, under the name `family:partition`. What an image looks like depends
on the table alone and not on where its units run, so one rank gets the same tables with every unit on rank 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..ir import WHOLE, Partition, Pattern, UsageError

__all__ = ["FAMILIES", "Family", "check_gpus", "exact_patterns", "family_of", "generate_patterns", "on_ranks"]

MAX_GPUS = 2


@dataclass(frozen=True, kw_only=True)
class Family:
    """One way to run a step, for any partition that suits it."""

    name: str
    table: str
    """Printable form on two ranks."""
    partitions: tuple[str, ...] = (WHOLE,)
    """Names of the partitions that it is generated for."""
    exact: bool = False
    """Whether its steps are exact; such a family cannot be switched off."""

    def on(self, partition: Partition | None) -> Pattern:
        """The table on `partition` (None: the whole denoiser)."""
        if partition is None:
            return Pattern.parse(self.name, self.table)
        return Pattern.parse(
            f"{self.name}:{partition.name}", self.table, partition=partition.name, stages=len(partition.stages)
        )


# The two ranks of a pipeline step wait for each other, so only even splits suit it. Reuse needs a last stage that
# sees this step's latents; the back of a linear split sees nothing but reused values, which `reuse` does for free.
_EVEN, _AROUND = ("linear", "nested"), ("nested", "thin")

FAMILIES: tuple[Family, ...] = (
    Family(name="single", table="u0@0 c0@0 | cfg", exact=True),
    Family(name="branch", table="u0@0 c0@1 | cfg", exact=True),
    Family(name="paper", table="u0@0(c1~) c1@1(u0~) | mirror", partitions=_EVEN),
    Family(name="cond-pipe", table="c0@0(c1~) c1@1(c0~) | delta", partitions=_EVEN),
    Family(name="cond-pipe-unguided", table="c0@0(c1~) c1@1(c0~) | mirror", partitions=_EVEN),
    Family(name="branch-reuse", table="u1@0(u0~) c1@1(c0~) | cfg", partitions=_AROUND),
    Family(name="reuse", table="- | last"),
)


def generate_patterns(partitions: Sequence[Partition], gpus: int = 2) -> tuple[Pattern, ...]:
    """All tables for `gpus` ranks over `partitions` and the whole denoiser, in the order of `FAMILIES`.

    Partitions of other names or with more than two stages suit no family and are passed over. On one rank `branch`
    is the same table as `single` and is left out.

    Raises:
        UsageError: `gpus` is not 1 or 2.
    """
    check_gpus(gpus)
    patterns = []
    for family in FAMILIES:
        if WHOLE in family.partitions:
            patterns.append(family.on(None))
        patterns.extend(
            family.on(p) for name in family.partitions for p in partitions if p.name == name and len(p.stages) == 2
        )
    return _distinct(on_ranks(pattern, gpus) for pattern in patterns)


def exact_patterns(gpus: int) -> tuple[Pattern, ...]:
    """The exact tables for `gpus` ranks: `single`, and `branch` where there is a second rank."""
    check_gpus(gpus)
    return _distinct(on_ranks(family.on(None), gpus) for family in FAMILIES if family.exact)


def on_ranks(pattern: Pattern, world: int) -> Pattern:
    """The same table folded onto at most `world` ranks, neighbours together; unchanged where it fits already."""
    size = pattern.world_size
    if size <= world:
        return pattern
    units = tuple(unit.model_copy(update={"rank": unit.rank * world // size}) for unit in pattern.units)
    return Pattern(
        name=pattern.name, partition=pattern.partition, stages=pattern.stages, units=units, combine=pattern.combine
    )


def family_of(name: str) -> str:
    """The family of a pattern: its name up to the colon."""
    return name.partition(":")[0]


def check_gpus(gpus: int) -> None:
    """Refuse a number of GPUs that no family has a table for.

    Raises:
        UsageError: `gpus` is not 1 or 2.
    """
    if not 1 <= gpus <= MAX_GPUS:
        raise UsageError(f"got {gpus} GPUs; this planner makes tables for 1 or {MAX_GPUS} ranks")


def _distinct(patterns: Iterable[Pattern]) -> tuple[Pattern, ...]:
    """The first pattern of every table."""
    found: dict[tuple[str, str], Pattern] = {}
    for pattern in patterns:
        found.setdefault((pattern.partition, pattern.table), pattern)
    return tuple(found.values())
