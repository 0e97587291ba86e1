"""Placements: on which ranks the units of a table run. The image does not depend on them, the time does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..ir import Pattern, Unit, lower
from .cost import CostModel

__all__ = ["fastest_placement", "on_ranks", "placements"]


def placements(pattern: Pattern, world: int) -> tuple[Pattern, ...]:
    """Every sensible way to run a table on at most `world` ranks; the one with the least busy busiest rank first.

    Units are laid out in one of two orders and neighbours put together, as evenly as units can be counted: stage by
    stage (both branches of a stage are one batched launch) or branch by branch (a pipeline per branch). Of equally
    busy ones, that is the order.
    """
    if not pattern.units:
        return (pattern,)
    stages = sorted({unit.stage for unit in pattern.units})
    width = len(pattern.units)
    columns, rows = len(stages), len({unit.branch for unit in pattern.units})
    by_branch = sorted(pattern.units, key=lambda unit: (unit.branch == "cond", unit.stage))
    number = {id(unit): index for index, unit in enumerate(by_branch)}

    def stage_by_stage(unit: Unit) -> int:
        return _share(stages.index(unit.stage), columns, world)

    def branch_by_branch(unit: Unit) -> int:
        return _share(number[id(unit)], width, world)

    found: dict[tuple[int, ...], Pattern] = {}
    layouts: list[Callable[[Unit], int]] = [stage_by_stage, *([branch_by_branch] if rows > 1 else [])]
    for layout in layouts:
        ranks = tuple(layout(unit) for unit in pattern.units)
        found.setdefault(ranks, _placed(pattern, ranks))
    return tuple(sorted(found.values(), key=_busiest))


def fastest_placement(
    pattern: Pattern, world: int, model: CostModel, speeds: Sequence[float] | None = None
) -> Pattern:
    """The placement of least predicted latency among `placements`; with unequal `speeds` (one per rank), also among
    those that give the most work to the fastest rank, the next most to the next, and so on.

    Of equally fast ones, the first. Exact tables stay as they are divided.
    """
    candidates = placements(pattern, world) if not pattern.is_exact else (pattern,)
    if speeds is not None and len(set(speeds)) > 1:
        candidates += tuple(_matched(placed, model, speeds) for placed in candidates)
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda placed: model.step(placed).latency_s)


def _matched(pattern: Pattern, model: CostModel, speeds: Sequence[float]) -> Pattern:
    loads = dict.fromkeys(range(len(speeds)), 0.0)
    for segment in lower(pattern):
        loads[segment.rank] += model.segment_seconds(segment, pattern.stages) * speeds[segment.rank]
    heaviest = sorted(loads, key=lambda rank: -loads[rank])
    fastest = sorted(range(len(speeds)), key=lambda rank: -speeds[rank])
    target = dict(zip(heaviest, fastest))
    return _placed(pattern, [target[unit.rank] for unit in pattern.units])


def on_ranks(pattern: Pattern, world: int) -> Pattern:
    """The same table folded onto at most `world` ranks, neighbours together; unchanged where it fits already."""
    size = pattern.world_size
    if size <= world:
        return pattern
    return _placed(pattern, [unit.rank * world // size for unit in pattern.units])


def _placed(pattern: Pattern, ranks: Sequence[int]) -> Pattern:
    units = tuple(unit.model_copy(update={"rank": rank}) for unit, rank in zip(pattern.units, ranks))
    return Pattern(
        name=pattern.name, partition=pattern.partition, stages=pattern.stages, units=units, combine=pattern.combine
    )


def _share(index: int, count: int, world: int) -> int:
    return index if count <= world else index * world // count


def _busiest(pattern: Pattern) -> int:
    ranks = [unit.rank for unit in pattern.units]
    return max(map(ranks.count, ranks))
