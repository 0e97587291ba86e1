"""What a profile states as its spread covers how far the machine's speed wanders meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hybridiff_compiler.ir import Costs, LayerTiming, StageCost
from hybridiff_compiler.profiler import drift
from hybridiff_compiler.profiler.drift import Drift
from hybridiff_compiler.profiler.partial import Partial


def sampler(seconds: Iterator[float]):  # type: ignore[no-untyped-def]
    """One time per look: a look takes one sample that does not count and three that do."""
    taken: list[float] = []

    def sample() -> tuple[float]:
        if len(taken) % 4 == 0:
            sample.now = next(seconds)  # type: ignore[attr-defined]
        taken.append(sample.now)  # type: ignore[attr-defined]
        return (taken[-1],)

    return sample


def test_two_measurements_differ_by_less_in_19_of_20_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "_EVERY_S", 0.0)
    generator = np.random.default_rng(0)
    watched = Drift(sampler(iter(generator.normal(2.0, 0.1, 400))), [])
    assert watched.spread == 0.0
    for _ in range(400):
        watched.look()
    pairs = generator.normal(2.0, 0.1, (10_000, 2))
    within = np.abs(np.diff(pairs)) <= watched.spread * 2.0
    assert 0.93 < within.mean() < 0.97


def test_looks_are_seconds_apart_and_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 2.0, 3.0])
    watched = Drift(sampler(times), [])
    for _ in range(3):
        watched.look()
    assert list(times) == [2.0, 3.0], "one look; the others came too soon"
    monkeypatch.setattr(drift, "_EVERY_S", 0.0)
    thread = threading.Thread(target=watched.look)
    thread.start()
    thread.join()
    assert watched.spread == 0.0


def test_times_of_a_stopped_session_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(drift, "_EVERY_S", 0.0)
    file = tmp_path / "p.json.partial"
    for seconds in (1.0, 3.0):
        partial = Partial(file, {})
        watched = Drift(sampler(iter([seconds])), partial.noted("times"))
        watched.look()
        partial.put(f"part at {seconds}", None)
    assert watched.spread == pytest.approx(1.96 * 2**0.5 * 2**0.5 / 2.0)


def test_spreads_cover_it() -> None:
    costs = Costs(
        layers={1: (1.0, 2.0)}, timing=LayerTiming(method="wall", spread={1: (0.03, 0.0)}),
        stages=(StageCost(partition="whole", stages=(0,), batch=1, seconds=3.0, spread=0.04),),
    ).with_drift(0.04)
    assert costs.timing is not None
    assert costs.timing.spread == {1: (0.05, 0.04)}
    assert costs.stages[0].spread == pytest.approx(0.04 * 2**0.5)
