"""Sharing the work on errors among processes: prompts and schedules are independent of each other.

Every process has a copy of the pipeline and computes with the same number of threads, so what comes out does not depend
on who computed what.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from .closures import pack
from .processes import Process

__all__ = ["ErrorHelpers"]

_POLL_S = 0.5


class ErrorHelpers:
    """Some processes that measure parts; close them when done. Without any, everything is measured here."""

    def __init__(
        self, count: int, threads: int, arguments: Any, on_note: Callable[[str], None] = lambda text: None
    ) -> None:
        """
        Args:
            count: processes besides this one.
            threads: torch threads of each.
            arguments: of `ErrorMeasurement`, without its `Partial` and progress callback; they are pickled. If they
                cannot be, there are no helpers.
            on_note: called, from any thread, with why a helper is missing.
        """
        self._processes: dict[Process, threading.Thread] = {}
        """With the thread that hands over the pipeline, before which nothing may be asked."""
        self._note = on_note
        if not count:
            return
        try:
            state = pack((threads, arguments))
        except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
            on_note(f"no other process shares the work on errors: the pipeline cannot be handed to one ({error})")
            return
        for _ in range(count):
            process = Process("hybridiff_compiler.profiler.error_worker", threads)
            thread = threading.Thread(target=_begin, args=(process, state), daemon=True)
            self._processes[process] = thread
            thread.start()

    @property
    def running(self) -> int:
        """Processes besides this one that are there to share the work."""
        return sum(process.running for process in self._processes)

    def share(
        self, what: str, tasks: Sequence[Any], here: Callable[[Any], Any], done: Callable[[Any, Any], None],
        context: Any = None,
    ) -> None:
        """Have all tasks done, by this process and the others, each taking the next one.

        Args:
            what: method of `error_worker` that does a task.
            tasks: what to do, the longest ones first.
            here: does a task in this process.
            done: called in this process with every task and its result, as they are finished.
            context: passed to `what` with each task.
        """
        queue, results = deque(tasks), SimpleQueue[tuple[Any, Any]]()
        left = len(queue)
        lock = threading.Lock()

        def serve(process: Process) -> None:
            self._processes[process].join()
            while True:
                with lock:
                    if not queue:
                        return
                    task = queue.popleft()
                try:
                    answer = process.ask(pickle.dumps((what, task, context)))
                    results.put((task, pickle.loads(answer)))  # noqa: S301 - from our own process
                except (OSError, pickle.PickleError) as error:
                    with lock:
                        queue.appendleft(task)  # somebody else does it
                    process.close()
                    self._note(f"a process that shared the work on errors ended: {error}")
                    return

        threads = [threading.Thread(target=serve, args=(p,), daemon=True) for p in self._processes if p.running]
        for thread in threads:
            thread.start()
        while left:
            with lock:
                task, mine = (queue.popleft(), True) if queue else (None, False)
            if mine:
                done(task, here(task))
                left -= 1
            while left:
                try:
                    finished = results.get(block=not mine and any(t.is_alive() for t in threads), timeout=_POLL_S)
                except Empty:
                    break
                done(*finished)
                left -= 1

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.close()
        self._processes.clear()


def _begin(process: Process, state: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # what it died of is said when something is asked of it
        process.write(state)
