"""The published adaptive rule as a schedule: METHOD.md's constants, fitted to a profile."""

from __future__ import annotations

import math

from ..ir import AdaptiveSchedule, InputError, Pattern, Profile
from .patterns import family_of, generate_patterns
from .placement import on_ranks

__all__ = ["paper_schedule", "paper_window"]

_PUBLISHED_STEPS = 50
# Paper, section on adaptive switching: (L, eps, k, tau_cap) at 50 steps for SDXL with DDIM and for SD3 with flow Euler.
_DIFFUSION = (12, 4e-4, 5, 15)
_FLOW_MATCHING = (15, 5e-4, 5, 40)


def paper_schedule(profile: Profile, warmup: str, window: str) -> AdaptiveSchedule:
    """The adaptive rule with the published constants: SD3's for flow matching, else SDXL's.

    At other numbers of steps L, k and the cap scale with it; the slope threshold, a change per step, scales inversely.
    """
    history, eps, k, cap = _FLOW_MATCHING if "flow" in profile.scheduler.lower() else _DIFFUSION
    scale = profile.num_steps / _PUBLISHED_STEPS
    length = min(max(1, round(k * scale)), profile.num_steps - 1)
    return AdaptiveSchedule(
        num_steps=profile.num_steps, warmup=warmup, window=window, history=max(1, round(history * scale)),
        eps=eps / scale, k=length, tau_cap=max(1, min(round(cap * scale), profile.num_steps - length)),
    )


def paper_window(profile: Profile, gpus: int) -> Pattern:
    """The `paper:*` pattern for the parallelism phase: least error just after a fresh step (geometric mean over steps);
    where errors were not measured, the one whose stages exchange the fewest bytes.

    Raises:
        InputError: the profile has no partition for one.
    """
    generated = generate_patterns(profile.partitions, 2)
    by_name = {pattern.name: pattern for pattern in (*generated, *profile.patterns)}
    # The published pattern is about two stages; its generalisations to more are the planner's to choose.
    candidates = [p for name, p in by_name.items() if family_of(name) == "paper" and p.stages == 2]
    if not candidates:
        raise InputError(
            f"the profile has no partition for the paper's pattern (it has {[p.name for p in profile.partitions]}); "
            "profile a model of two layers or more, or use the policy 'exact'"
        )
    return on_ranks(min(candidates, key=lambda pattern: _badness(profile, pattern)), gpus)


def _badness(profile: Profile, pattern: Pattern) -> tuple[float, float, str]:
    errors = profile.errors_by_pattern.get(pattern.name)
    level = math.inf
    if errors is not None:
        reachable = [sum(c.rmse[step][0] for c in errors.curves) for step in range(1, profile.num_steps)]
        logs = [math.log(max(error, 1e-12)) for error in reachable]
        level = math.fsum(logs) / max(1, len(logs))
    partition = profile.partition(pattern.partition)
    exchanged = sum(
        value.nbytes for a in range(len(partition.stages)) for b in range(len(partition.stages)) if a != b
        for value in partition.cut(profile.graph, a, b)
    )
    return level, exchanged, pattern.name
