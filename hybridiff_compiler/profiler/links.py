"""Links between ranks: latency and bandwidth, fitted to messages over the transport that the runtime uses.

Every rank is a process of its own (`link_worker`), so a transfer that never ends can be given up, and what is measured
is what a plan's ranks will meet: the same packing, the same process group, the same device.

What a message from a to b takes cannot be read off one clock. So each sample is a chain of round trips, n bytes out
and a 64-byte token back. They are fitted by `2 x latency + n / bandwidth`: the bandwidth is that of one direction,
only the latency is taken to be the same there and back. Broadcasts are timed several at once, as they are used, until
the root has a token from everybody.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import least_squares

from ..ir import Broadcast, Costs, Link, UsageError
from ..runtime.processes import WorkerPool, open_store

__all__ = ["SIZES", "fit_alpha_beta", "links_from_samples", "measure_links", "with_links"]

SIZES = tuple(4096 * 4**power for power in range(8))
"""Message sizes in bytes: 4 KiB to 64 MiB."""
TOKEN_BYTES = 64
DONE = "links"
"""Key, followed by `/rank`, under which a worker leaves what it measured."""

_MODULE = "hybridiff_compiler.profiler.link_worker"
_SOFT = 0.1
"""Relative distance from the model beyond which a size counts less and less (soft L1)."""

Samples = Mapping[int, Sequence[float]]
"""Message size in bytes -> seconds of each repeat."""


def measure_links(
    devices: Sequence[str],
    *,
    sizes: Sequence[int] = SIZES,
    repeats: int = 9,
    threads: int = 1,
    timeout_s: float = 180.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[tuple[Link, ...], tuple[Broadcast, ...]]:
    """Measure every ordered pair of ranks, and a broadcast from every rank.

    Args:
        devices: per rank, `cpu` or a CUDA device such as `cuda:0`; no two ranks may share a GPU.
        sizes: message sizes in bytes.
        repeats: samples per size (each a chain of messages, fewer for large ones); the median counts.
        threads: CPU threads per rank.
        timeout_s: after which the whole measurement is given up.
        on_progress: called with (0, 1) and (1, 1).

    Raises:
        UsageError: fewer than two devices, a mix of kinds, or fewer than two sizes.
        WorkerError: a rank failed or the time is over; the message has its traceback or where it was.
    """
    if len(devices) < 2:
        raise UsageError(f"got {len(devices)} device; links are between two ranks or more")
    if len({torch.device(device).type for device in devices}) > 1:
        raise UsageError(f"got devices {', '.join(devices)}; ranks of one plan are all on cpu or all on cuda")
    if len(set(sizes)) < 2 or min(sizes) < TOKEN_BYTES:
        raise UsageError(f"got sizes {list(sizes)}; give two different ones or more, of {TOKEN_BYTES} bytes or more")
    on_progress(0, 1)
    store = open_store()
    start = {
        "host": "127.0.0.1", "port": store.port, "devices": list(devices), "sizes": sorted(set(sizes)),
        "repeats": repeats, "timeout_s": timeout_s, "threads": threads,
    }
    pool = WorkerPool(len(devices) + 1, store, threads=threads, module=_MODULE)
    try:
        for worker in range(1, len(devices) + 1):
            pool.send_frame(worker, json.dumps(start).encode())
        pool.wait_for(DONE, timeout_s=timeout_s)
        measured: dict[str, dict[int, list[float]]] = {}
        for worker in range(1, len(devices) + 1):
            for name, samples in json.loads(pool.answer(f"{DONE}/{worker}")).items():
                measured[name] = {int(size): seconds for size, seconds in samples.items()}
    finally:
        pool.close()
    on_progress(1, 1)
    return links_from_samples(measured, len(devices))


def links_from_samples(
    measured: Mapping[str, Samples], ranks: int
) -> tuple[tuple[Link, ...], tuple[Broadcast, ...]]:
    """Fits of raw samples: `"a>b"` round trips with a token back, `"a*"` broadcasts from a."""
    links, broadcasts = [], []
    for name, samples in measured.items():
        sizes = sorted(samples)
        rounds = [float(np.median(samples[size])) for size in sizes]
        intercept, bandwidth, residual = fit_alpha_beta(sizes, rounds)
        source, separator, target = name.partition(">")
        latency = intercept / 2 if separator else intercept
        fields = {
            "latency_s": latency, "bytes_per_s": bandwidth, "residual": residual,
            "points": tuple((size, max(seconds - intercept + latency, 0.0)) for size, seconds in zip(sizes, rounds)),
            "spread": float(np.median([_relative_range(samples[size]) for size in sizes])),
        }
        if separator:
            links.append(Link(source=int(source), target=int(target), **fields))  # type: ignore[arg-type]
        else:
            broadcasts.append(Broadcast(root=int(source.removesuffix("*")), ranks=ranks, **fields))  # type: ignore[arg-type]
    links.sort(key=lambda link: (link.source, link.target))
    return tuple(links), tuple(sorted(broadcasts, key=lambda broadcast: broadcast.root))


def fit_alpha_beta(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Fit `seconds = latency + size / bandwidth`.

    Relative distances are minimised, so that microseconds of a small message weigh as much as milliseconds of a large
    one, under a soft-L1 loss, so that a size at which the transport changes its protocol, or that was disturbed, does
    not bend the line.

    Returns:
        Latency in seconds, bandwidth in bytes per second, and the median relative distance of the points.
    """
    n, t = np.asarray(sizes, dtype=float), np.asarray(seconds, dtype=float)
    smallest, largest = int(np.argmin(n)), int(np.argmax(n))
    scale = np.array([t[smallest], t[largest] / n[largest]])

    def distances(parameters: np.ndarray) -> np.ndarray:
        latency, per_byte = parameters * scale
        distance: np.ndarray = (latency + per_byte * n) / t - 1
        return distance

    fit = least_squares(distances, np.ones(2), bounds=([0.0, 1e-6], [np.inf, np.inf]), loss="soft_l1", f_scale=_SOFT)
    latency, per_byte = fit.x * scale
    return float(latency), float(1 / per_byte), float(np.median(np.abs(distances(fit.x))))


def with_links(costs: Costs, devices: Sequence[str], *, threads: int = 1,
               on_progress: Callable[[int, int], None] = lambda done, total: None) -> Costs:
    """`costs` with the links between `devices` measured now; unchanged for a single device.

    Raises:
        UsageError, WorkerError: see `measure_links`.
    """
    if len(devices) < 2:
        return costs
    links, broadcasts = measure_links(devices, threads=threads, on_progress=on_progress)
    transport: Literal["gloo", "nccl"] = "nccl" if torch.device(devices[0]).type == "cuda" else "gloo"
    return costs.model_copy(update={"links": links, "broadcasts": broadcasts, "transport": transport})


def _relative_range(sample: Sequence[float]) -> float:
    low, median, high = np.quantile(np.asarray(sample, dtype=float), [0.25, 0.5, 0.75])
    return float((high - low) / median) if median else 0.0
