"""What cheap steps lose by reading values one step old, and how well that ranks the errors that were measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

from ..ir import Combine, LayerGraph, Partition, Pattern, Profile, Value, lower
from .patterns import family_of

__all__ = ["Ranking", "StaleTable", "lost_bytes", "rank_errors", "stale_tables", "stale_values"]

_EQUAL_DB = 0.1
"""Errors that differ by less are equal: no measurement of one is better than that."""


@dataclass(frozen=True, kw_only=True)
class StaleTable:
    """A pattern whose estimate depends on values of an earlier step."""

    pattern: str
    family: str
    lost_bytes: float
    """Bytes times change per step of the values that its estimates take from the step before."""
    error_db: float
    """20 log10 of the image error of one step run so, everything one step old; mean over the steps."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Pairs of tables that differ in their partition only, and of different error and loss."""

    pairs: int
    agreeing: int
    """In how many the table that loses less errs less."""


def stale_values(graph: LayerGraph, partition: Partition, pattern: Pattern) -> tuple[Value, ...]:
    """The values, each once, that the segments which make the pattern's estimates take from an earlier step."""
    found: dict[str, Value] = {}
    for segment in lower(pattern):
        if not segment.has_estimate:
            continue
        for stage in set(range(len(partition.stages))).difference(segment.stages):
            if any(segment.read(branch, stage).stale for branch in segment.branches):
                found |= {value.name: value for value in partition.received(graph, stage, segment.stages)}
    return tuple(found.values())


def lost_bytes(values: Iterable[Value], change: Mapping[str, float]) -> float | None:
    """Sum of bytes times relative change; None where the change of one is not known."""
    values = tuple(values)
    if any(value.name not in change for value in values):
        return None
    return math.fsum(value.nbytes * change[value.name] for value in values)


def stale_tables(profile: Profile) -> list[StaleTable]:
    """The profile's patterns that read stale values, with what they lose and how much they were measured to err.

    Those that give up guidance are left out: what that costs hides the rest.
    """
    change = {} if profile.redundancy is None else profile.redundancy.mean
    found = []
    for pattern in profile.patterns:
        errors = profile.errors_by_pattern.get(pattern.name)
        curves = () if errors is None or pattern.combine is Combine.MIRROR else errors.curves
        values = stale_values(profile.graph, profile.partition(pattern.partition), pattern)
        lost = lost_bytes(values, change)
        for curve in curves:
            if curve.source == "activations" and curve.gap is None and values and lost is not None:
                rows = [20 * math.log10(row[0]) for row in curve.rmse if row[0] > 0]
                found.append(StaleTable(
                    pattern=pattern.name, family=family_of(pattern.name), lost_bytes=lost,
                    error_db=math.fsum(rows) / len(rows) if rows else -math.inf,
                ))
    return found


def rank_errors(tables: Iterable[StaleTable]) -> Ranking:
    """How often, of two tables of one family, the one that loses less was measured to err less."""
    by_family: dict[str, list[StaleTable]] = defaultdict(list)
    for table in tables:
        by_family[table.family].append(table)
    pairs = [
        (a, b) for group in by_family.values() for a, b in combinations(group, 2)
        if abs(a.error_db - b.error_db) >= _EQUAL_DB and not math.isclose(a.lost_bytes, b.lost_bytes, rel_tol=1e-3)
    ]
    agreeing = sum((a.error_db < b.error_db) == (a.lost_bytes < b.lost_bytes) for a, b in pairs)
    return Ranking(pairs=len(pairs), agreeing=agreeing)
