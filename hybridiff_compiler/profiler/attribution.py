"""How much of a schedule's summed error comes from what: staleness, reuse or lost guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir import AgeModel, ErrorCurve, Pattern, PatternErrors, at_gap

__all__ = ["group_of", "grouped_errors", "weighted"]


def group_of(pattern: Pattern, curve: ErrorCurve) -> str:
    """What kind of error a curve describes: how the estimates are combined, and what ages, e.g. `delta/memory`.

    Steps of one kind err in like directions, so they add up alike in a whole schedule. Activations of stages that are
    not computed at all (`cfg/reused`) age otherwise than those that every step computes anew from stale ones.
    """
    ages: str = curve.source
    if ages == "activations" and len({unit.stage for unit in pattern.units}) < pattern.stages:
        ages = "reused"
    return f"{pattern.combine.value}{'+trend' if pattern.trend else ''}/{ages}"


def grouped_errors(
    patterns: Mapping[str, Pattern], errors: Mapping[str, PatternErrors], steps: Sequence[str]
) -> dict[str, float]:
    """Summed step errors (RMSE of the final image) of a schedule by group; their sum is what the planner minimises.

    Args:
        patterns: by name, at least those of `steps`.
        errors: measured curves by pattern name.
        steps: a pattern name per step.

    Raises:
        KeyError: a step's pattern is unknown, or neither exact nor measured.
        IndexError: something is older than was measured.
    """
    model = AgeModel.of(patterns[name] for name in dict.fromkeys(steps))
    ages = model.start
    sums: dict[str, float] = {}
    for step, name in enumerate(steps):
        pattern = patterns[name]
        if not pattern.is_exact:
            for curve in at_gap(errors[name].curves, model.gap(ages, pattern)):
                age = {
                    "activations": model.activation_age(ages, pattern), "memory": model.memory_age(ages, pattern),
                    "none": 1,
                }[curve.source]
                group = group_of(pattern, curve)
                sums[group] = sums.get(group, 0.0) + curve.rmse[step][age - 1]
        ages = model.advance(ages, pattern)
    return sums


def weighted(
    errors: Sequence[PatternErrors], patterns: Mapping[str, Pattern], weights: Mapping[str, float]
) -> tuple[PatternErrors, ...]:
    """The curves, each multiplied by the weight of its group (1 where there is none)."""
    return tuple(
        PatternErrors(pattern=each.pattern, curves=tuple(
            _scaled(curve, weights.get(group_of(patterns[each.pattern], curve), 1.0)) for curve in each.curves
        )) for each in errors
    )


def _scaled(curve: ErrorCurve, factor: float) -> ErrorCurve:
    rows = tuple(tuple(float(f"{value * factor:.6g}") for value in row) for row in curve.rmse)
    return ErrorCurve(source=curve.source, gap=curve.gap, rmse=rows)
