"""The tables a plan may choose from, generated from the partitions and the number of ranks.

One rule makes them all. A step may compute every stage or reuse the inner ones; for both branches, for the conditional
one alone, or the front for one branch and the back for the other (the paper's phase 2); stages on different ranks read
each other stale; what is missing of the guidance pair is the last difference, or guidance is off. Each such choice is
a *rank-free* table, and what an image looks like depends on that alone; a *placement* then puts its units on ranks.
Tables that no choice of stage times could make worth running are left out.

A *family* is all tables of the same choices; a table is named `family:partition`, with `+k` when it computes `k` of
several stages around the reused ones. Equal names mean equal rank-free tables, so an error measured once holds for
every placement.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..ir import Branch, Combine, Partition, Pattern, Read, Unit, dry_run
from .placement import on_ranks, placements
from .worlds import check_gpus

__all__ = [
    "FAMILIES", "Family", "exact_patterns", "family_of", "generate_patterns", "measured_patterns", "rank_free",
]

Work = Literal["both", "cond", "split", "nothing"]
"""Which branch computes what: both everything, the conditional one alone, front and back one each, or nothing."""
_KIND = re.compile(r"(linear|nested|thin)\d*")


@dataclass(frozen=True, kw_only=True)
class Family:
    """All tables that make the same choices, over whatever partition."""

    name: str
    work: Work
    divided: bool
    """Whether the denoiser is divided into stages at all."""
    reused: bool
    """Whether inner stages are not computed."""
    combine: Combine
    trend: float = 0.0
    """See `Pattern.trend`."""
    exact: bool = False
    """Whether its steps are exact; such a family cannot be switched off."""


FAMILIES: tuple[Family, ...] = (
    Family(name="single", work="both", divided=False, reused=False, combine=Combine.CFG, exact=True),
    Family(name="branch", work="both", divided=False, reused=False, combine=Combine.CFG, exact=True),
    Family(name="pipe", work="both", divided=True, reused=False, combine=Combine.CFG),
    Family(name="paper", work="split", divided=True, reused=False, combine=Combine.MIRROR),
    Family(name="cond-delta", work="cond", divided=False, reused=False, combine=Combine.DELTA),
    Family(name="cond-only", work="cond", divided=False, reused=False, combine=Combine.MIRROR),
    Family(name="cond-pipe", work="cond", divided=True, reused=False, combine=Combine.DELTA),
    Family(name="cond-pipe-unguided", work="cond", divided=True, reused=False, combine=Combine.MIRROR),
    Family(name="branch-reuse", work="both", divided=True, reused=True, combine=Combine.CFG),
    Family(name="cond-reuse", work="cond", divided=True, reused=True, combine=Combine.DELTA),
    Family(name="reuse", work="nothing", divided=False, reused=True, combine=Combine.LAST),
    Family(name="half-trend", work="nothing", divided=False, reused=True, combine=Combine.LAST, trend=0.5),
    Family(name="trend", work="nothing", divided=False, reused=True, combine=Combine.LAST, trend=1.0),
)
"""Every consistent choice but three: an estimate of two branches takes no difference between them, one without its
inner stages is not also left unguided, and the paper's front and back are both computed."""


@dataclass(frozen=True)
class _Candidate:
    family: Family
    table: Pattern
    """On rank 0 alone."""
    cuts: int = 0
    """Computed stages that read each other stale, less one."""
    share: float = 1.0
    """Share of the stages that is computed."""
    kind: str = ""
    """How the partition divides: linear, nested or thin."""


def generate_patterns(partitions: Sequence[Partition], gpus: int = 2) -> tuple[Pattern, ...]:
    """All tables worth running on `gpus` ranks over `partitions` and the whole denoiser, in the order of `FAMILIES`.

    Every table is placed on the ranks so that its busiest rank has the fewest units (`placements` has the others).
    Left out are tables that a better one matches whatever the stage times: those that do as much on their busiest
    rank as the same choices with fewer cuts (on one rank nothing is cut), and those that compute one branch where
    both take no longer. Partitions of other names than `candidate_partitions` gives suit no family.

    Raises:
        UsageError: `gpus` is out of range.
    """
    check_gpus(gpus)
    placed: dict[str, tuple[_Candidate, Pattern]] = {}
    for candidate in _candidates(partitions):
        table = candidate.table
        if candidate.family.exact:
            table = table.model_copy(update={"units": _exact_units(candidate.family.name == "branch" and gpus > 1)})
        else:
            table = placements(table, gpus)[0]
        placed.setdefault(table.name, (candidate, table))
    every = list(placed.values())
    kept = _distinct(table for candidate, table in every if not _pointless(candidate, table, every))
    for table in kept:
        dry_run([kept[0], kept[0], table, table])
    return kept


def exact_patterns(gpus: int) -> tuple[Pattern, ...]:
    """The exact tables for `gpus` ranks: `single`, and `branch` where there is a second rank."""
    return tuple(pattern for pattern in generate_patterns((), gpus) if pattern.is_exact)


def measured_patterns(
    partitions: Sequence[Partition], gpus: Iterable[int] = (1, 2, 4), *, trends: bool = True
) -> tuple[Pattern, ...]:
    """The tables whose errors a profile for these numbers of ranks should measure, each rank-free one once.

    Ranks are those of two GPUs, where a table fits on them, else folded onto two. Without `trends`, tables that draw a
    line through earlier estimates are left out.

    Raises:
        UsageError: a number of ranks is out of range.
    """
    order = {family.name: index for index, family in enumerate(FAMILIES)}
    found = {
        p.name: on_ranks(p, 2) for world in (2, *gpus) for p in generate_patterns(partitions, world)
        if trends or not p.trend
    }
    return tuple(sorted(found.values(), key=lambda pattern: order[family_of(pattern.name)]))


def rank_free(pattern: Pattern) -> str:
    """What the image of a table depends on, as text: its partition and its units without ranks.

    Patterns of the planner have equal names exactly where these are equal (exact ones apart).
    """
    units = sorted(pattern.units, key=lambda unit: (unit.branch, unit.stage))
    bare = pattern.model_copy(update={"units": tuple(unit.model_copy(update={"rank": 0}) for unit in units)})
    return f"{bare.partition}/{bare.stages}: {bare.table}"


def family_of(name: str) -> str:
    """The family of a pattern: its name up to the colon."""
    return name.partition(":")[0]


def _candidates(partitions: Sequence[Partition]) -> Iterator[_Candidate]:
    """Every table of every family on every partition that suits it, on rank 0."""
    for family in FAMILIES:
        if not family.divided:
            yield _Candidate(family, _whole(family))
            continue
        for partition in partitions:
            match = _KIND.fullmatch(partition.name)
            stages = len(partition.stages)
            if match is None or stages < 2:
                continue
            for computed in _computed(family, match[1], stages):
                table = _table(family, partition, computed)
                yield _Candidate(family, table, computed - 1, computed / stages, match[1])


def _whole(family: Family) -> Pattern:
    branches: dict[Work, tuple[Branch, ...]] = {"both": ("uncond", "cond"), "cond": ("cond",), "nothing": ()}
    units = tuple(Unit(branch=branch, stage=0, rank=0) for branch in branches[family.work])
    return Pattern(name=family.name, units=units, combine=family.combine, trend=family.trend)


def _computed(family: Family, kind: str, stages: int) -> tuple[int, ...]:
    """How many of the last stages a table of `family` computes.

    The ranks of a pipeline step wait for each other, so only even splits suit it. Reuse needs a last stage that sees
    this step's latents; the back of a linear split sees nothing but reused values, which `reuse` does for free. Of
    many rings, the outer half is computed (the outermost alone is what `thin` is made for), and for both branches: a
    rank to spare does more good there than in a third approximation.
    """
    if not family.reused:
        return (stages,) if kind in ("linear", "nested") else ()
    if kind == "linear" or (stages > 2 and family.work != "both"):
        return ()
    return (stages // 2,)


def _table(family: Family, partition: Partition, computed: int) -> Pattern:
    stages = len(partition.stages)
    first = stages - computed
    front = first + computed // 2
    owners: dict[Work, dict[Branch, range]] = {
        "both": {"uncond": range(first, stages), "cond": range(first, stages)},
        "cond": {"cond": range(first, stages)},
        "split": {"uncond": range(first, front), "cond": range(front, stages)},
    }
    computes = owners[family.work]
    units = []
    for branch, own in computes.items():
        reads = [_stale_read(stage, _source(computes, branch, stage)) for stage in range(stages)]
        units += [Unit(branch=branch, stage=k, rank=0, reads=(*reads[:k], *reads[k + 1 :])) for k in own]
    suffix = f"+{computed}" if first and computed > 1 else ""
    return Pattern(
        name=f"{family.name}:{partition.name}{suffix}", partition=partition.name, stages=stages, units=tuple(units),
        combine=family.combine,
    )


@lru_cache(maxsize=256)
def _stale_read(stage: int, branch: Branch) -> Read:
    return Read(stage=stage, branch=branch, stale=True)


def _source(computes: dict[Branch, range], branch: Branch, stage: int) -> Branch:
    """Whose values of `stage` a unit of `branch` reads: its own where they are computed, else whoever's are."""
    owners = [branch, *(other for other in computes if other != branch)]
    return next((owner for owner in owners if stage in computes[owner]), branch)


def _exact_units(divided: bool) -> tuple[Unit, ...]:
    return (Unit(branch="uncond", stage=0, rank=0), Unit(branch="cond", stage=0, rank=int(divided)))


def _pointless(candidate: _Candidate, table: Pattern, every: Sequence[tuple[_Candidate, Pattern]]) -> bool:
    """Whether another table is as good in every respect that the stage times have no say in."""
    if candidate.family.exact or candidate.family.work == "nothing":
        return False
    return any(
        _load(rival) <= _load(table) and (_fewer_cuts(other, candidate) or _both_branches(other, candidate))
        for other, rival in every if rival is not table
    )


def _load(table: Pattern) -> float:
    """Work of the busiest rank, in evaluations of the denoiser for one branch if all stages take equally long."""
    units = [unit.rank for unit in table.units]
    return max(map(units.count, units), default=0) / table.stages


def _fewer_cuts(rival: _Candidate, candidate: _Candidate) -> bool:
    """Whether `rival` computes the same share of the same branches for the same use with fewer stale reads."""
    if rival.cuts >= candidate.cuts or rival.family.combine is not candidate.family.combine:
        return False
    if rival.share != candidate.share or (rival.cuts and rival.kind != candidate.kind):
        return False
    # With nothing cut, one branch computes the paper's front and back.
    return rival.family.work == candidate.family.work or (rival.family.work, candidate.family.work) == ("cond", "split")


def _both_branches(rival: _Candidate, candidate: _Candidate) -> bool:
    """Whether `rival` computes the same stages, each for both branches."""
    return (rival.family.work, candidate.family.work == "both") == ("both", False) and (
        (rival.table.partition, rival.share) == (candidate.table.partition, candidate.share)
    )


def _distinct(patterns: Iterable[Pattern]) -> tuple[Pattern, ...]:
    """The first pattern of every table."""
    found: dict[tuple[str, str], Pattern] = {}
    for pattern in patterns:
        found.setdefault((pattern.partition, pattern.table), pattern)
    return tuple(found.values())
