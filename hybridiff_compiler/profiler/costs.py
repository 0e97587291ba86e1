"""Layer times of a denoiser, and how they are made to agree with stages that were timed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.optimize import lsq_linear

from .timing import Timing

__all__ = ["LayerMethod", "LayerTimes", "StageTime", "fit_to_stages", "layer_times", "stage_distance"]

LayerMethod = Literal["compiled", "eager"]
"""Which graph of the whole the marks between layers are put in."""

_WITHIN = (0.2, 5.0)
"""How far stages may rescale a layer."""
_LOYALTY = 1e-2
"""Weight of staying near the layer's own measurement, against one stage's."""
_SPREAD = 0.03
"""Relative spread at which a stage's word counts for about two thirds."""


@dataclass(frozen=True)
class StageTime:
    """A measured stage, for fitting layers to it."""

    shares: Mapping[str, float]
    """Per layer, which part of it the stage evaluates."""
    seconds: float
    spread: float = 0.0
    """Relative inter-quartile range."""


@dataclass(frozen=True)
class LayerTimes:
    """Layers of the whole denoiser at one batch size."""

    seconds: tuple[float, ...]
    """In graph order."""
    spread: tuple[float, ...]
    """Relative inter-quartile range of each."""

    def scaled_to(self, whole_s: float) -> LayerTimes:
        """With all layers scaled so that their sum is `whole_s` seconds."""
        factor = whole_s / sum(self.seconds)
        return replace(self, seconds=tuple(value * factor for value in self.seconds))


def layer_times(plain: Mapping[int, Sequence[Timing]], compiled: Sequence[Timing] | None) -> dict[int, LayerTimes]:
    """Layer times per batch from marks between layers (see `marks`).

    The uncompiled whole is marked at every batch, the compiled one, which takes minutes to build, at batch 1 only: what
    compiling gains each layer there it is taken to gain at the others.

    Args:
        plain: per batch, layers of the uncompiled whole in graph order.
        compiled: layers of the compiled whole at batch 1, if that is what will run and it was measured.
    """
    gain: np.ndarray | float = 1.0
    spread = {batch: tuple(timing.spread for timing in timings) for batch, timings in plain.items()}
    if compiled is not None:
        gain = _seconds(compiled) / _seconds(plain[1])
        spread[1] = tuple(timing.spread for timing in compiled)
    return {
        batch: LayerTimes(tuple((_seconds(timings) * gain).tolist()), spread[batch])
        for batch, timings in plain.items()
    }


def _seconds(timings: Iterable[Timing]) -> np.ndarray:
    return np.array([max(timing.median, 1e-9) for timing in timings])


def fit_to_stages(
    names: Sequence[str], seconds: Sequence[float], stages: Iterable[StageTime]
) -> tuple[float, ...]:
    """Layer times that agree with measured stages.

    Least squares over factors r of the layers: `sum over stages of v (sum of r_i t_i s_i / measured - 1)^2 +
    w * sum of share_i (r_i - 1)^2`, s being the part of a layer that the stage evaluates, r within 0.2 to 5; v falls
    with the stage's spread. Layers that always share a stage keep their ratios; a stage that comes out slower than its
    layers makes all of them slower.

    Args:
        names: layers in graph order.
        seconds: their times t.
        stages: the measured stages, whole denoiser included.
    """
    times = np.asarray(seconds, dtype=float)
    rows, wanted = [], []
    for stage in stages:
        trust = 1 / np.hypot(1.0, stage.spread / _SPREAD)
        parts = np.array([stage.shares.get(name, 0.0) for name in names])
        rows.append(trust * parts * times / stage.seconds)
        wanted.append(trust)
    loyal = np.sqrt(_LOYALTY * times / times.sum())
    matrix = np.vstack([*rows, np.diag(loyal)])
    solution = lsq_linear(matrix, np.concatenate([wanted, loyal]), bounds=_WITHIN)
    return tuple((solution.x * times).tolist())


def stage_distance(
    names: Sequence[str], seconds: Sequence[float], stages: Iterable[StageTime]
) -> float:
    """Largest relative distance between a measured stage and the sum of its layers (of what it evaluates of them)."""
    by_name = dict(zip(names, seconds))
    return max(
        (abs(sum(part * by_name[name] for name, part in stage.shares.items()) / stage.seconds - 1) for stage in stages),
        default=0.0,
    )
