"""One profile for other numbers of steps: error curves over noise level instead of step number.

What a step of a cheap pattern does to the image follows from how far the denoiser's activations or estimates have moved
since they were computed, which is a distance along the trajectory, and from how far the step goes. So, with positions
along the trajectory counted in the profile's steps,

- step j of the new schedule sits at the position whose noise level it has;
- its error is that of one profiled step around there, times the number of profiled steps that it spans;
- an age of `a` new steps is the distance back to the position of the step that computed the value, and likewise the
  gap of a trend.

Between measured steps and ages errors are straight lines; nothing has aged at distance 0, so sources of pure staleness
start from no error there. Compounding (the summed error's PSNR) is taken over: a sum over twice as many steps of half
the error each is the same sum. `DRIFT_DB` widens its residual by what this was measured to miss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..ir import Combine, ErrorCurve, Guidance, PatternErrors, Profile, UsageError

__all__ = ["DRIFT_DB", "at_steps", "noise_levels_of"]

DRIFT_DB = 1.0
"""Residual of predictions per doubling or halving of the number of steps, in dB."""
_MAX_AGE = 12
"""Largest age of a derived curve: more make the solver's state space large and are never chosen."""
_FINEST, _COARSEST = 0.25, 5.0
"""Least and greatest length of a derived step, in steps of the profile."""


def noise_levels_of(profile: Profile) -> tuple[float, ...]:
    """Noise level of every step, 1 being pure noise; falls evenly where the profile did not record it."""
    return profile.noise_levels or tuple(1 - step / profile.num_steps for step in range(profile.num_steps))


def at_steps(
    profile: Profile, num_steps: int | None = None, *, strength: float = 1.0,
    noise_levels: Sequence[float] | None = None,
) -> Profile:
    """The profile as it would be with another number of steps of the same scheduler, or at given noise levels.

    Args:
        profile: measured.
        num_steps: `num_inference_steps` of the pipeline call; default: the profile's.
        strength: of image-to-image: only the last `int(num_steps * strength)` steps run, as in diffusers.
        noise_levels: instead of both, the noise level of every step (another scheduler's, say): timestep over number
            of training timesteps, decreasing.

    Raises:
        UsageError: fewer than 3 steps, more than four times or less than a fifth of the profile's, a strength outside
            (0, 1], or noise levels that do not decrease.
    """
    old = profile.num_steps
    if noise_levels is not None:
        position = _positions(profile, noise_levels)
    else:
        total = old if num_steps is None else num_steps
        if total == old and strength == 1.0:
            return profile
        if not 0 < strength <= 1:
            raise UsageError(f"got strength={strength:g}; give a number above 0 and at most 1")
        if total > 2 * old / _FINEST:  # before arrays of that length are made
            raise _too_different(total, old)
        run = min(total, int(total * strength))
        position = _same_scheduler(profile, total)[total - run :]
    if len(position) < 3:
        raise UsageError(f"got {len(position)} steps; a schedule needs at least 3")
    span = _spans(position, old)
    typical = float(np.median(span))
    if not _FINEST <= typical <= _COARSEST:
        if noise_levels is None:
            raise _too_different(total, old)
        raise UsageError(
            f"got noise levels {typical:.2g} times as far apart as those of the profile ({old} steps); it can be used "
            f"for {_FINEST:g} to {_COARSEST:g} times, profile the model with a nearer number of steps"
        )
    grid = np.arange(old)
    middle = np.clip(position + (span - 1) / 2, 0, old - 1)
    errors = tuple(
        PatternErrors(pattern=each.pattern, curves=(
            *(_curve(curve, _pure(profile, each.pattern, curve), position, middle, span, typical)
              for curve in each.curves if curve.gap is None),
            *_trends([curve for curve in each.curves if curve.gap is not None], position, middle, span, typical),
        ))
        for each in profile.errors
    )

    def moved(curves: Guidance) -> Guidance:
        return curves.model_copy(update={"rel_mae": tuple(
            tuple(np.interp(position, grid, row).tolist()) for row in curves.rel_mae
        )})

    drift = DRIFT_DB * abs(math.log2(typical))
    compounding = profile.compounding.model_copy(update={
        "residual_db": math.hypot(profile.compounding.residual_db, drift)
    })
    known = np.asarray(noise_levels_of(profile))
    before = 2 * known[0] - known[1]  # finer steps may begin before the profile's first one
    levels = np.interp(position, [-1, *grid], [before, *known]) if noise_levels is None else noise_levels
    return profile.model_copy(update={
        "num_steps": len(position), "errors": errors, "compounding": compounding, "redundancy": None,
        "guidance": profile.guidance and moved(profile.guidance),
        "further_guidance": tuple(moved(curves) for curves in profile.further_guidance),
        "noise_levels": tuple(map(float, levels)),
    })


def _too_different(total: int, old: int) -> UsageError:
    return UsageError(
        f"got {total} steps; a profile of {old} steps can be used for about {old / _COARSEST:.0f} to "
        f"{old / _FINEST:.0f}, profile the model with a nearer number of steps"
    )


def _same_scheduler(profile: Profile, total: int) -> NDArray[np.float64]:
    """Positions of `total` steps of the profile's scheduler, as far as its own levels show how it spaces them: first
    and last step kept where the first is pure noise (flow matching, "linspace" and "trailing" spacing), else the last
    step kept and the others further apart ("leading" spacing)."""
    old, levels = profile.num_steps, profile.noise_levels
    if len(levels) > 1:
        starts_from_noise = levels[0] > 1 - (levels[0] - levels[-1]) / (old - 1) / 2
    else:
        starts_from_noise = "flow" in profile.scheduler.lower()
    steps = np.arange(total)
    if starts_from_noise:
        return np.asarray(steps * ((old - 1) / max(1, total - 1)), dtype=np.float64)
    return np.asarray(old - 1 - (total - 1 - steps) * (old / max(1, total)), dtype=np.float64)


def _positions(profile: Profile, levels: Sequence[float]) -> NDArray[np.float64]:
    """Where in the profile's trajectory (in steps) the noise levels lie; its last step ends at level 0."""
    wanted = np.asarray(levels, dtype=float)
    if (np.diff(wanted) >= 0).any() or len(wanted) == 0:
        raise UsageError("noise levels must decrease from step to step, e.g. scheduler.timesteps / 1000")
    known = np.array([*noise_levels_of(profile), 0.0])
    position = np.interp(-wanted, -known, np.arange(len(known)))
    return np.minimum(position, profile.num_steps - 1e-3)


def _spans(position: NDArray[np.float64], old: int) -> NDArray[np.float64]:
    """How many profiled steps each step spans; the last one goes to the end, but no further than the one before."""
    span = np.diff(position, append=float(old))
    if len(span) > 1:
        span[-1] = min(max(span[-1], 1e-3), max(span[-2], 1.0))
    return np.maximum(span, 1e-3)


def _pure(profile: Profile, name: str, curve: ErrorCurve) -> bool:
    """Whether a curve starts from no error at age 0: not where the pattern also gives up guidance."""
    pattern = next(p for p in profile.patterns if p.name == name)
    return curve.source == "memory" or pattern.combine is not Combine.MIRROR


def _curve(
    curve: ErrorCurve, pure: bool, position: NDArray[np.float64], middle: NDArray[np.float64],
    span: NDArray[np.float64], typical: float,
) -> ErrorCurve:
    rmse = np.asarray(curve.rmse, dtype=float)
    steps = np.arange(len(rmse))
    by_age = np.stack([np.interp(middle, steps, column) for column in rmse.T], axis=1)
    if curve.source == "none":
        return ErrorCurve(source="none", rmse=tuple(map(tuple, (by_age * span[:, None]).tolist())))
    first = by_age[:, 0]
    second = by_age[:, 1] if by_age.shape[1] > 1 else 2 * first
    fresh = np.zeros_like(first) if pure else np.clip(2 * first - second, 0, first)
    known = np.concatenate([fresh[:, None], by_age], axis=1)
    largest = max(1, min(_MAX_AGE, int(curve.max_age / typical + 1e-9)))
    result = np.empty((len(position), largest))
    for step in range(len(position)):
        for age in range(1, largest + 1):
            back = position[step] - position[step - age] if age <= step else age * typical
            result[step, age - 1] = _at(known[step], back)
    return ErrorCurve(source=curve.source, rmse=tuple(map(tuple, (result * span[:, None]).tolist())))


def _trends(
    curves: Sequence[ErrorCurve], position: NDArray[np.float64], middle: NDArray[np.float64],
    span: NDArray[np.float64], typical: float,
) -> list[ErrorCurve]:
    """As `_curve`, at the measured gaps that, counted in new steps, are no larger than the largest measured one."""
    if not curves:
        return []
    curves = sorted(curves, key=lambda curve: curve.gap or 0)
    gaps = [curve.gap or 0 for curve in curves]
    steps = np.arange(len(curves[0].rmse))
    known = []
    for curve in curves:
        by_age = [np.interp(middle, steps, column) for column in np.asarray(curve.rmse).T]
        known.append(np.stack([np.zeros(len(position)), *by_age], axis=1))
    oldest = max(1, min(_MAX_AGE, int(max(curve.max_age for curve in curves) / typical + 1e-9)))
    result = []
    for gap in [gap for gap in gaps if gap * typical <= gaps[-1] + 1e-9] or [1]:
        largest = min(oldest, max(curve.max_age for curve in curves if (curve.gap or 0) <= gap or curve is curves[0]))
        rmse = np.empty((len(position), largest))
        for step in range(len(position)):
            for age in range(1, largest + 1):
                back = position[step] - position[step - age] if age <= step else age * typical
                early = age + gap > step
                apart = gap * typical if early else position[step - age] - position[step - age - gap]
                rmse[step, age - 1] = np.interp(apart, gaps, [_at(rows[step], back) for rows in known])
        result.append(ErrorCurve(source="memory", gap=gap, rmse=tuple(map(tuple, (rmse * span[:, None]).tolist()))))
    return result


def _at(row: NDArray[np.float64], distance: float) -> float:
    """A line through ages 0, 1, 2, ...; beyond the last one it goes on as between the last two, never down."""
    last = len(row) - 1
    if distance <= last:
        return float(np.interp(distance, np.arange(len(row)), row))
    return float(row[-1] + max(0.0, row[-1] - row[-2]) * (distance - last))
