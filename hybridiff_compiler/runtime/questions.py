"""What the driver asks all ranks between generations: times of their graphs, peaks of memory, traces."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from ..ir import WorkerError
from .executor import RankExecutor
from .memory import peak_bytes
from .orders import REPORTING, TIMING, TRACING
from .processes import REPORTED, TIMED, TRACED, Pool
from .trace import RankTrace, merge_traces
from .transport import PeerError

__all__ = ["Questions"]


class Questions:
    """Numbered questions, so that no answer is taken for that to another one."""

    def __init__(
        self, device: torch.device, world_size: int, index: Mapping[str, int], pool: Pool | None,
        send: Callable[[int, int, int | None, int], None], fail: Callable[[BaseException, str], NoReturn],
    ) -> None:
        """
        Args:
            device: rank 0's.
            world_size: number of ranks.
            index: of the plan's patterns by name.
            pool: where workers answer; None in a world of one rank.
            send: gives a rank the order (kind, pattern, number).
            fail: closes the plan and says why, when a worker turns out to be gone.
        """
        self._device, self._world_size, self._index, self._pool = device, world_size, index, pool
        self._send, self._fail = send, fail
        self._asked = 0

    def stage_seconds(self, name: str, executor: RankExecutor) -> list[float]:
        """Time of every rank's graphs of pattern `name` alone, measured on all of them at once; `executor` is rank 0's.

        Raises:
            WorkerError: a worker is gone.
        """
        seconds = [0.0] * self._world_size
        asked = sorted(executor.flow(name).ranks - {0})
        number = self._next()
        with self._closing("timing the stages"):
            for rank in asked:
                self._send(rank, TIMING, self._index[name], number)
            seconds[0] = executor.stage_seconds(name)
            for rank in asked:
                seconds[rank] = float(self._answer(f"{TIMED}/{number}/{rank}"))
        return seconds

    def peak_bytes(self) -> list[int]:
        """The most memory that every rank has needed so far.

        Raises:
            WorkerError: a worker is gone.
        """
        peaks, number = [peak_bytes(self._device)], self._next()
        with self._closing("asking for peaks of memory"):
            for rank in range(1, self._world_size):
                self._send(rank, REPORTING, None, number)
                peaks.append(int(self._answer(f"{REPORTED}/{number}/{rank}")))
        return peaks

    @contextmanager
    def traced(self, target: Path) -> Iterator[None]:
        """Record what all ranks do while open, and write `target` at the end."""
        number, ranks = self._next(), range(1, self._world_size)
        own = RankTrace(self._device)
        with tempfile.TemporaryDirectory() as folder:
            for rank in ranks:
                assert self._pool is not None
                self._pool.tell(f"{TRACED}/{number}", folder)
                self._send(rank, TRACING, 0, number)
                self._answer(f"{TRACED}/{number}/{rank}/started")
            own.start()
            try:
                yield
            finally:
                own.stop(Path(folder) / "0.json")
                for rank in ranks:
                    self._send(rank, TRACING, 1, number)
                    self._answer(f"{TRACED}/{number}/{rank}")
            merge_traces([Path(folder) / f"{rank}.json" for rank in (0, *ranks)], target)

    def _next(self) -> int:
        self._asked += 1
        return self._asked

    def _answer(self, key: str) -> str:
        assert self._pool is not None
        return self._pool.answer(key)

    @contextmanager
    def _closing(self, doing: str) -> Iterator[None]:
        """Close and say why if a worker turns out to be gone."""
        try:
            yield
        except (PeerError, WorkerError) as error:
            self._fail(error, doing)
