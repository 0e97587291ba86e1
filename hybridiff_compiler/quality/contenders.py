"""What is compared with what: the plans of a demo or benchmark over one profile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..ir import FixedSchedule, Plan, Predictions, Profile
from ..planner import alternating_plan, fewer_steps, plan

__all__ = ["Contender", "all_tables", "contenders"]

TARGETS_DB = (30.0, 35.0, 40.0)
EQUAL_COST_DB = (30.0, 35.0)
"""Planned rows that get two rows of equal ideal cost beside them."""


@dataclass(frozen=True)
class Contender:
    """One row: a name and the plan that it runs. Fewer steps than the profile's are compared with the full run."""

    name: str
    plan: Plan


def contenders(
    profile: Profile, *, gpus: int = 2, targets: Iterable[float] = TARGETS_DB, beside: Iterable[float] = EQUAL_COST_DB
) -> list[Contender]:
    """`branch`, `paper`, `planned-as-paper` (the least error at the paper's predicted latency), `planned-T` for each
    target, and beside some of them the two honest rows of equal ideal cost: `fewer-steps-T` (plainly fewer exact
    steps) and `alternating-reuse-T` (exact steps and `reuse`, spread evenly)."""
    branch = plan(profile, gpus=gpus, policy="exact")
    paper = plan(profile, gpus=gpus, policy="paper")
    rows = [Contender("branch", branch), Contender("paper", paper)]
    if paper.predictions.speedup is not None:
        rows.append(Contender("planned-as-paper", plan(profile, gpus=gpus, speedup=paper.predictions.speedup)))
    wanted = set(beside)
    for target in targets:
        planned = plan(profile, gpus=gpus, min_psnr=target)
        rows.append(Contender(f"planned-{target:g}", planned))
        if target in wanted:
            rows.append(Contender(f"fewer-steps-{target:g}", _shortened(branch, fewer_steps(profile, planned))))
            rows.append(Contender(f"alternating-reuse-{target:g}", alternating_plan(profile, planned)))
    return rows


def all_tables(plans: Sequence[Plan]) -> Plan:
    """An exact plan that knows the tables of all `plans` (of one model, on equal ranks)."""
    first = plans[0]
    patterns = {pattern.name: pattern for each in plans for pattern in each.patterns}
    partitions = {partition.name: partition for each in plans for partition in each.partitions}
    fields = dict(first)
    return Plan(**(fields | {
        "partitions": tuple(partitions.values()), "patterns": tuple(patterns.values()), "predictions": Predictions(),
        "schedule": FixedSchedule(steps=(first.exact,) * first.num_steps),
    }))


def _shortened(exact: Plan, steps: int) -> Plan:
    """The exact plan with fewer steps; its speed-ups stay relative to the full number on one rank."""
    known = exact.predictions
    factor = exact.num_steps / steps
    shorter = exact.with_steps((exact.exact,) * steps)
    predictions = Predictions(
        latency_s=None if known.latency_s is None else known.latency_s / factor, single_s=known.single_s,
        speedup=None if known.speedup is None else known.speedup * factor,
        ideal_speedup=None if known.ideal_speedup is None else known.ideal_speedup * factor,
        work_speedup=None if known.work_speedup is None else known.work_speedup * factor,
        target="fewer steps",
    )
    return Plan(**(dict(shorter) | {"predictions": predictions}))
