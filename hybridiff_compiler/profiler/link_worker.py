"""One rank of a link measurement: `python -m hybridiff_compiler.profiler.link_worker`, started by `measure_links`.

All ranks follow one programme: for every ordered pair, and for a broadcast from every rank, they meet, the ranks
concerned exchange chains of messages, and the first of them notes the time. On CUDA that is device time between events
on the stream that the transfers are ordered by; the device is kept busy first, so that the hosts have queued a whole
chain by the time that it starts, as they have while a denoiser computes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist

from ..runtime.connect import connect
from ..runtime.transport import Channel, Layout, PeerError, Transport
from ..runtime.worker_process import run_worker
from .links import DONE, TOKEN_BYTES

__all__ = ["main"]

_WARM_UPS = 2
_CHAIN_BYTES = 32 << 20
_LONGEST_CHAIN = 16
_HEAD_START_S = 4e-3
_CLOCK_HZ = 2e9
"""About what `torch.cuda._sleep` counts in a second."""


class _Rank:
    """One rank's part of the programme."""

    def __init__(self, rank: int, start: dict[str, Any], store: dist.Store) -> None:
        self._rank, self._start, self._store = rank, start, store
        self._world = len(start["devices"])
        self._device = torch.device(start["devices"][rank])
        self._meetings = 0
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._transport: Transport = connect(
            store, rank, self._world, timeout_s=start["timeout_s"], device=self._device
        )

    def run(self) -> dict[str, dict[int, list[float]]]:
        """Samples by pair (`a>b`) and root (`a*`), of those that this rank timed: seconds by message size."""
        found: dict[str, dict[int, list[float]]] = {}
        sizes = [TOKEN_BYTES, *self._start["sizes"]]
        for source, target in permutations(range(self._world), 2):
            self._meet()
            if self._rank in (source, target):
                samples = self._samples(sizes, partial(self._round_trips, source, target))
                if self._rank == source:
                    found[f"{source}>{target}"] = samples
        for root in range(self._world):
            self._meet()
            samples = self._samples(sizes, partial(self._broadcasts, root))
            if self._rank == root:
                found[f"{root}*"] = samples
        self._meet()
        self._transport.close()
        return found

    def _samples(self, sizes: Sequence[int], chain: Callable[[int], float]) -> dict[int, list[float]]:
        """Sizes take turns, so that a disturbance of the machine meets all of them alike."""
        samples: dict[int, list[float]] = {size: [] for size in sizes}
        for repeat in range(_WARM_UPS + self._start["repeats"]):
            for size in sizes:
                seconds = chain(size)
                if repeat >= _WARM_UPS:
                    samples[size].append(seconds)
        return samples

    def _round_trips(self, source: int, target: int, size: int) -> float:
        """Seconds of one round trip, mean over a chain of them."""
        count = _length(size)
        message, token = _layout(size), _layout(TOKEN_BYTES)
        out = torch.zeros(size, dtype=torch.uint8, device=self._device)
        reply = torch.zeros(TOKEN_BYTES, dtype=torch.uint8, device=self._device)

        def exchange() -> None:
            for _ in range(count):
                if self._rank == source:
                    self._transport.send(target, Channel.VALUES, message, [out])
                    self._transport.receive(target, Channel.VALUES, token).wait()
                else:
                    self._transport.receive(source, Channel.VALUES, message).wait()
                    self._transport.send(source, Channel.VALUES, token, [reply])

        return self._timed(exchange) / count

    def _broadcasts(self, root: int, size: int) -> float:
        """Seconds of one broadcast, mean over some on the way together; the root hears from everybody at the end."""
        count, token = _length(size), _layout(TOKEN_BYTES)
        data = [torch.zeros(size, dtype=torch.uint8, device=self._device) for _ in range(count)]
        reply = torch.zeros(TOKEN_BYTES, dtype=torch.uint8, device=self._device)

        def exchange() -> None:
            self._transport.broadcast(data, root=root)
            if self._rank != root:
                self._transport.send(root, Channel.VALUES, token, [reply])
                return
            for peer in range(self._world):
                if peer != root:
                    self._transport.receive(peer, Channel.VALUES, token).wait()

        return self._timed(exchange) / count

    def _timed(self, exchange: Callable[[], None]) -> float:
        if self._device.type != "cuda":
            began = time.perf_counter()
            exchange()
            return time.perf_counter() - began
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(_HEAD_START_S * _CLOCK_HZ))
        begin.record()
        exchange()
        end.record()
        deadline = time.monotonic() + self._start["timeout_s"]
        while not end.query():
            if time.monotonic() > deadline:
                raise PeerError(-1, "exchanging messages with", True, "a chain of messages did not end")
            time.sleep(1e-4)
        return float(begin.elapsed_time(end)) / 1e3

    def _meet(self) -> None:
        """Wait for all ranks, without the transport."""
        key = f"meeting/{self._meetings}"
        self._meetings += 1
        if self._store.add(key, 1) == self._world:
            self._store.set(f"{key}/all", "")
        self._store.wait([f"{key}/all"], timedelta(seconds=self._start["timeout_s"]))


def _length(size: int) -> int:
    """Messages in a chain."""
    return max(1, min(_LONGEST_CHAIN, _CHAIN_BYTES // size))


def _layout(size: int) -> Layout:
    if size not in _LAYOUTS:
        _LAYOUTS[size] = Layout([((size,), torch.uint8)])
    return _LAYOUTS[size]


_LAYOUTS: dict[int, Layout] = {}
"""One per size: the transport keeps its buffers by layout."""


def _serve(rank: int, start: dict[str, Any], _frames: Sequence[bytes], store: dist.Store) -> None:
    torch.set_num_threads(start["threads"])
    found = _Rank(rank - 1, start, store).run()
    store.set(f"{DONE}/{rank}", json.dumps(found))


def main() -> None:
    """Entry point of the process."""
    run_worker(_serve)


if __name__ == "__main__":
    main()
