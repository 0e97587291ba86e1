"""Layer times of hardware that is not at hand, from arithmetic and bytes.

Model of one layer at a batch: `t = a F / P + b M / B + c`, with F its arithmetic, M the bytes it moves, P and B the
device's peaks, and a, b, c one triple for all layers: what a perfect machine would take is stretched by 1/efficiency
(a for arithmetic, b for memory), and every layer pays a start. The two times are added, not overlapped as in the
roofline model of Williams et al. (CACM 2009), since layers are chains of kernels of both kinds; adding also keeps the
fit a linear one.

Fitted on a profile measured elsewhere, the triple carries over to another device; for a profile of the same denoiser so
does each layer's own distance from the model.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

from ..ir import Costs, InputError, LayerGraph, LayerTiming, Link, ModelInfo, Partition, Pattern, Profile, Provenance
from .devices import Device, recognise

__all__ = ["DEFAULT", "Efficiency", "device_of", "estimate_layers", "estimate_profile", "fit_efficiency"]

_LINK_SHARE = 0.8
"""Share of a link's nominal rate that large messages reach."""
_BOUNDS = ([1.0, 0.1, 0.0], [50.0, 50.0, 1e-3])
"""Arithmetic is at best perfect; memory may look better than that where caches hold what passes between kernels."""


@dataclass(frozen=True)
class Efficiency:
    """How far from its peaks a device runs layers."""

    arithmetic: float
    """Stretch `a` of the arithmetic's time: 1 / efficiency."""
    memory: float
    """Stretch `b` of the memory's time."""
    start_s: float
    """Seconds `c` that every layer takes besides."""
    source: str
    """Where the figures are from."""


DEFAULT = Efficiency(1 / 0.6, 1 / 0.8, 2e-6, "60 % of peak arithmetic, 80 % of peak memory rate (not fitted)")
"""Where no measured profile is given: usual shares of large fused fp16 graphs."""


def device_of(profile: Profile) -> Device:
    """Peak figures of the device that a profile was measured on.

    Raises:
        InputError: it is an estimate itself, or of an unknown device.
    """
    if profile.provenance.estimated is not None:
        raise InputError("efficiency cannot be fitted on an estimated profile; give a measured one")
    device = recognise(profile.provenance.device)
    if device is None:
        raise InputError(
            f"no peak figures of {profile.provenance.device!r}, which this profile was measured on; fit on a profile "
            "of a device that --estimate knows"
        )
    return device


def fit_efficiency(profile: Profile) -> Efficiency:
    """The triple that fits a measured profile's layers best.

    Least squares over layers and batches of the distance in units of the square root of the layer's time, so that a
    layer counts by the time it takes, large or small. In networks of equal blocks the three terms are hard to tell
    apart: of triples that fit about as well, within the distance that the best one leaves, it is the one nearest to the
    usual shares (`DEFAULT`).

    Raises:
        InputError: see `device_of` and `Device.flops`; or the profile has no layer times, or its graph no arithmetic.
    """
    device, dtype = device_of(profile), profile.model.dtype
    if not any(sum(seconds) > 0 for seconds in profile.costs.layers.values()):
        raise InputError("efficiency cannot be fitted on a profile without layer times; profile the model again")
    rows, wanted = [], []
    for batch, seconds in profile.costs.layers.items():
        weight = 1 / np.sqrt(np.maximum(np.asarray(seconds), 1e-9))
        rows.append(_terms(profile.graph, device, dtype, batch) * weight[:, None])
        wanted.append(np.asarray(seconds) * weight)
    matrix, target = np.vstack(rows), np.concatenate(wanted)
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-30)
    low, high = (np.asarray(bound) for bound in _BOUNDS)
    usual = np.array([DEFAULT.arithmetic, DEFAULT.memory, DEFAULT.start_s])
    free = lsq_linear(matrix / scale, target, bounds=(low * scale, high * scale)).x
    misfit = float(np.linalg.norm(matrix / scale @ free - target))  # what the terms do not explain anyway
    fit = lsq_linear(
        np.vstack([matrix / scale, misfit * np.diag(1 / (usual * scale))]), np.concatenate([target, [misfit] * 3]),
        bounds=(low * scale, high * scale),
    )
    a, b, c = fit.x / scale
    return Efficiency(float(a), float(b), float(c), f"fitted on {profile.model.name} on {profile.provenance.device}")


def estimate_layers(
    graph: LayerGraph, dtype: str, batch: int, device: Device, efficiency: Efficiency
) -> NDArray[np.float64]:
    """Seconds of every layer of `graph` at `batch` branches on `device`."""
    stretch = np.array([efficiency.arithmetic, efficiency.memory, efficiency.start_s])
    seconds: NDArray[np.float64] = _terms(graph, device, dtype, batch) @ stretch
    return seconds


def estimate_profile(
    model: ModelInfo,
    graph: LayerGraph,
    device: Device,
    tables: Callable[[LayerGraph, Sequence[float]], tuple[tuple[Partition, ...], tuple[Pattern, ...]]],
    *,
    ranks: int = 2,
    fit: Profile | None = None,
    num_steps: int = 50,
    guidance_scale: float = 5.0,
    scheduler: str = "",
    random_weights: bool = False,
) -> Profile:
    """A profile of `model` on `ranks` GPUs of a kind that is not at hand.

    Args:
        model, graph: of the denoiser at one branch's shapes.
        device: see `devices`.
        tables: from layer graph and layer times, the partitions and patterns to plan with.
        ranks: between which links are estimated, all alike.
        fit: a measured profile whose efficiency is taken over. If it is of the same denoiser, so are each layer's
            distance from the model, and guidance, errors and what they are of.
        num_steps, guidance_scale, scheduler: noted, unless `fit` has errors of the same denoiser.
        random_weights: noted.

    Raises:
        InputError: see `fit_efficiency`.
    """
    efficiency = DEFAULT if fit is None else fit_efficiency(fit)
    same = fit is not None and fit.model.fingerprint == graph.fingerprint()
    layers = {}
    for batch in (1, 2):
        seconds = estimate_layers(graph, model.dtype, batch, device, efficiency)
        if same and fit is not None and batch in fit.costs.layers:
            here = estimate_layers(fit.graph, fit.model.dtype, batch, device_of(fit), efficiency)
            seconds = seconds * np.asarray(fit.costs.layers[batch]) / here
        layers[batch] = tuple(float(value) for value in seconds)
    costs = Costs(
        layers=layers, timing=LayerTiming(method="roofline", whole_s={b: sum(times) for b, times in layers.items()}),
        step_overhead_s=fit.costs.step_overhead_s if fit is not None else 0.0,
        links=tuple(
            Link(source=a, target=b, latency_s=device.link_latency_s, bytes_per_s=device.link_bytes_per_s * _LINK_SHARE)
            for a in range(ranks) for b in range(ranks) if a != b
        ),
    )
    how = f"roofline: {efficiency.source}; arithmetic x{efficiency.arithmetic:.2f}, memory x{efficiency.memory:.2f}, "
    how += f"{1e6 * efficiency.start_s:.1f} us per layer" + ("; layer by layer from the measured ones" if same else "")
    provenance = Provenance(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), device=device.name,
        device_type="cuda", backend="inductor" if fit is None else fit.provenance.backend, versions={}, seed=0,
        prompts=0, prompts_sha256="", random_weights=random_weights, estimated=how,
    )
    if same and fit is not None and fit.errors:
        return fit.model_copy(update={
            "costs": costs, "provenance": provenance, "errors_provenance": fit.errors_provenance or fit.provenance,
        })
    partitions, patterns = tables(graph, layers[1])
    return Profile(
        model=model, graph=graph, costs=costs, num_steps=num_steps, scheduler=scheduler, guidance_scale=guidance_scale,
        partitions=partitions, patterns=patterns, provenance=provenance,
    )


def _terms(graph: LayerGraph, device: Device, dtype: str, batch: int) -> NDArray[np.float64]:
    """`[layer, 3]`: perfect seconds of the arithmetic, of the memory traffic, and 1."""
    flops = np.array([layer.flops for layer in graph.layers]) * batch
    if not flops.any():
        raise InputError("the layer graph counts no arithmetic, so nothing can be estimated from it; profile it again")
    passing = dict.fromkeys(graph.names, 0)
    for value in graph.values:
        passing[value.producer] += value.nbytes
        for consumer in value.consumers:
            passing[consumer] += value.nbytes
    moved = []
    for layer in graph.layers:
        once = layer.parameter_bytes
        each = max(layer.traffic_bytes - once, passing[layer.name])  # older graphs know the layer's borders only
        moved.append(once + batch * each)
    return np.column_stack([
        flops / device.flops(dtype), np.array(moved) / device.memory_bytes_per_s, np.ones(len(graph.layers)),
    ])
