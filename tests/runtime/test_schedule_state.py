"""Schedules that are found while generating: online against their definition, and two ranks against the simulator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_compiler.ir import FixedSchedule, Plan, SwitchedSchedule, parse_steps
from hybridiff_compiler.runtime.intercept import intercept
from hybridiff_compiler.runtime.parallelize import parallelize
from hybridiff_compiler.runtime.schedule_state import ScheduleState
from hybridiff_compiler.runtime.simulator import Simulator

from .tiny import TinyPipeline, adaptive, tiny_plan

CHOICES = ("branch*4 reuse paper branch-reuse branch", "branch*5 pipe cond-delta branch", "branch*8")


def switched(plan: Plan, thresholds: tuple[float, ...], *, measured: int = 3, **changes: object) -> Plan:
    schedule = SwitchedSchedule.model_validate({
        "choices": [FixedSchedule(steps=parse_steps(text)) for text in CHOICES[: len(thresholds) + 1]],
        "thresholds": thresholds, "measured": measured,
    } | changes)
    return Plan(**(dict(plan) | {"schedule": schedule}))


def pair(value: float) -> dict:
    return {"uncond": torch.ones(2), "cond": torch.full((2,), 1.0 + value)}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 20).map(float), min_size=8, max_size=8), st.integers(1, 4), st.integers(1, 3),
    st.sampled_from(["mean", "last", "slope"]), st.lists(st.integers(-10, 20), max_size=3, unique=True),
)
def test_what_runs_online_is_the_resolution(
    values: list[float], measured: int, lag: int, statistic: str, limits: list[int]
) -> None:
    if statistic == "slope" and measured == 1:
        measured = 2
    names = [f"n{k}" for k in range(len(limits) + 1)]
    head = measured - 1 + lag
    schedule = SwitchedSchedule(
        choices=tuple(FixedSchedule(steps=("b",) * head + (name,) * (8 - head)) for name in names),
        thresholds=tuple(sorted(map(float, limits))), measured=measured, statistic=statistic, lag=lag,
    )
    state = ScheduleState(schedule)
    ran = []
    for step in range(8):
        ran.append(state.pattern_at(step))
        state.observe(step, pair(values[step]))
    assert tuple(ran) == schedule.resolve(values).steps
    assert state.discrepancies == pytest.approx(tuple(values[:measured]))
    used = {"mean": sum(values[:measured]) / measured, "last": values[measured - 1]}.get(
        statistic, (values[measured - 1] - values[0]) / max(1, measured - 1)
    )
    assert ran[-1] == names[sum(used >= limit for limit in schedule.thresholds)]


def test_two_ranks_return_what_the_simulator_returns() -> None:
    pipe, alone = TinyPipeline(), TinyPipeline()
    base = tiny_plan(pipe, "branch")
    measured = []

    class Watching(Simulator):
        def start(self, num_steps, signature):
            measured.append(self._state.discrepancies)
            return super().start(num_steps, signature)

    probe = Watching(switched(base, (1e9,)), alone.denoiser)
    with intercept(alone, probe):
        for prompt in range(6):
            alone(prompt)
    values = sorted(sum(m) / 3 for m in [*measured[1:], probe._state.discrepancies])
    thresholds = ((values[1] + values[2]) / 2, (values[3] + values[4]) / 2)
    for lag in (1, 2):
        plan = switched(base, thresholds, lag=lag)
        simulator = Simulator(plan, alone.denoiser)
        seen = set()
        with parallelize(pipe, plan, threads=1) as ranks, intercept(alone, simulator):
            for prompt in range(6):
                image = pipe(prompt)
                assert torch.equal(image, alone(prompt))
                assert ranks.executed == tuple(simulator.executed)
                seen.add(ranks.executed)
            assert seen == {choice.steps for choice in plan.schedule.choices}
            ranks.use(adaptive(plan, lag=lag))
            simulated = Simulator(adaptive(plan, lag=lag), (other := TinyPipeline()).denoiser)
            with intercept(other, simulated):
                assert torch.equal(pipe(2), other(2))
