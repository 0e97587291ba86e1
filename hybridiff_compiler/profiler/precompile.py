"""Building stage graphs in helper processes, so that the profiling process finds them in the compiler's cache.

Inductor compiles one graph after the other in a process and takes a minute or two for a large denoiser, while it
caches on disk what it compiled. A helper makes the same denoiser (by an importable function, so with random weights:
weights are no part of compiled code), cuts the same graphs and compiles them. `precompile_worker` is such
a helper.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..ir import CallSignature, Data, Partition, Pattern, Segment

__all__ = ["Helpers", "Job", "Recipe"]

_QUIET_S = 0.3
"""After which what a stopped helper had queued on a GPU has run out."""


@dataclass(frozen=True)
class Recipe:
    """How a helper makes the denoiser."""

    function: str
    """`module:function`; called with `arguments`, it returns the denoiser."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """JSON values."""


class Job(Data):
    """One graph to build."""

    signature: CallSignature
    backend: str
    partitions: tuple[Partition, ...]
    patterns: tuple[Pattern, ...]
    segment: int
    """Position among the distinct segments of `patterns`."""


class Helpers:
    """Some helper processes; close them (or leave the `with` block) when done. Without any, nothing happens."""

    def __init__(self, recipe: Recipe | None, count: int, *, backend: str) -> None:
        """
        Args:
            recipe: how to make the denoiser; None for a denoiser that nobody else can make.
            count: processes; each holds the weights once more.
            backend: what to compile with.
        """
        self._backend = backend
        self._helpers: list[subprocess.Popen[str]] = []
        self._pending: list[threading.Thread] = []
        for _ in range(count if recipe is not None else 0):
            assert recipe is not None
            helper = subprocess.Popen(
                [sys.executable, "-m", "hybridiff_compiler.profiler.precompile_worker"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True, bufsize=1,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)},
            )
            self._helpers.append(helper)
            self._write(helper, {"function": recipe.function, "arguments": dict(recipe.arguments)})

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self, signature: CallSignature, partitions: Sequence[Partition], patterns: Sequence[Pattern],
        segments: Sequence[Segment],
    ) -> None:
        """Have the graphs of `segments`, which `patterns` launch, built; returns at once."""
        from .costs import distinct_segments

        numbers = {segment: number for number, segment in enumerate(distinct_segments(patterns).values())}
        queue = [
            Job(
                signature=signature, backend=self._backend, partitions=tuple(partitions), patterns=tuple(patterns),
                segment=numbers[segment],
            ).model_dump_json()
            for segment in segments
        ]
        lock = threading.Lock()
        for helper in self._helpers:
            thread = threading.Thread(target=self._feed, args=(helper, queue, lock), daemon=True)
            thread.start()
            self._pending.append(thread)

    def wait(self) -> None:
        """Until everything that was started has been built, or its helper is gone: then it is built here instead."""
        for thread in self._pending:
            thread.join()
        self._pending.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is built meanwhile (where processes can be stopped), so that others can take times."""
        stop, go_on = getattr(signal, "SIGSTOP", None), getattr(signal, "SIGCONT", None)
        running = [helper for helper in self._helpers if stop is not None and helper.poll() is None]
        try:
            for helper in running:
                helper.send_signal(stop)  # type: ignore[arg-type]
            if running:
                time.sleep(_QUIET_S)
            yield
        finally:
            for helper in running:
                helper.send_signal(go_on)  # type: ignore[arg-type]

    def close(self) -> None:
        """End the processes."""
        for helper in self._helpers:
            with contextlib.suppress(OSError):
                helper.stdin.close()  # type: ignore[union-attr]
            try:
                helper.wait(2)
            except subprocess.TimeoutExpired:
                helper.kill()
                helper.wait()
            helper.stdout.close()  # type: ignore[union-attr]
        self._helpers.clear()

    def _feed(self, helper: subprocess.Popen[str], queue: list[str], lock: threading.Lock) -> None:
        while True:
            with lock:
                if not queue:
                    return
                job = queue.pop(0)
            try:
                assert helper.stdin is not None
                assert helper.stdout is not None
                helper.stdin.write(job + "\n")
                if not helper.stdout.readline():
                    return
            except (OSError, ValueError):
                return

    @staticmethod
    def _write(helper: subprocess.Popen[str], message: Any) -> None:
        with contextlib.suppress(OSError):
            assert helper.stdin is not None
            helper.stdin.write(json.dumps(message) + "\n")
