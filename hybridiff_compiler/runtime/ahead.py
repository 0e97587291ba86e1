"""Processes that build graphs ahead: a compiler keeps one core busy for minutes per graph, and a machine has many.

What they build and from what is up to the module that they run: artifacts of a bundle, or graphs that end up in the
compiler's cache, where the process that needs them finds them. They take frames (see `processes`) on standard input:
first what does not change from job to job, then a job at a time, and answer each with a line of JSON; an answer with
the key `error` is a failure. `serve_jobs` is the other side.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backends.unpacking import remove_unpacked
from ..ir import InputError
from .processes import die_with, import_path, read_frame, working_directory, write_frame

__all__ = ["Builders", "default_jobs", "own_cores", "serve_jobs"]

_BYTES_PER_BUILDER = 2.0
"""Memory of a builder, in sizes of the denoiser's weights, besides what a process takes anyway."""
_BYTES_PER_PROCESS = 3 << 30
_TAIL_CHARACTERS = 4000
_STDIN = 0


def default_jobs(
    graphs: int, denoiser: nn.Module, cores: int | None = None, free: int | None = None, *, least: int = 1
) -> int:
    """How many builders this machine has cores and memory for.

    Args:
        graphs: stage graphs to build.
        denoiser: the network on its device.
        cores: processors (default: those that this process may use).
        free: bytes of memory that builders may take on the denoiser's device (default: what is free now).
        least: the answer where there is not enough even for that many.
    """
    parameter = next(denoiser.parameters())
    cores = own_cores() if cores is None else cores
    free = _free_bytes(parameter.device) if free is None else free
    weights = sum(p.nbytes for p in denoiser.parameters())
    each = int(_BYTES_PER_BUILDER * weights) + (0 if parameter.is_cuda else _BYTES_PER_PROCESS)
    return max(least, min(graphs, cores // 2, free // max(1, each)))


def own_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Builders:
    """Some processes at work on a queue of jobs; close them (or leave the `with` block) when done."""

    def __init__(self, module: str, start: Sequence[bytes], count: int, *, threads: int | None = None) -> None:
        """
        Args:
            module: what they run (`python -m`); it calls `serve_jobs`.
            start: frames that each gets first.
            count: number of processes.
            threads: of each; default: those that this process may use, divided among them.
        """
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, Any]] = deque()
        self._answers: dict[int, Any] = {}
        self._failures: list[BaseException] = []
        self._total = 0
        self._finished: set[int] = set()
        """Jobs that were done, have failed, or were claimed."""
        self._closed = False
        threads = max(1, own_cores() // max(1, count)) if threads is None else threads
        self._processes: list[_Process] = []
        try:
            for _ in range(count):
                self._processes.append(_Process(module, threads))
        except BaseException:
            self.close()
            raise
        self._alive = count
        for process in self._processes:
            threading.Thread(target=self._serve, args=(process, tuple(start)), daemon=True).start()

    def __enter__(self) -> Builders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, jobs: Sequence[Any]) -> None:
        """Have `jobs` (JSON values) done, the first ones first; returns at once. They are numbered as they come."""
        with self._changed:
            self._waiting.extend(enumerate(jobs, start=self._total))
            self._total += len(jobs)
            self._changed.notify_all()

    def claim(self, number: int) -> None:
        """Take a job back that nobody has begun; one that was begun is waited for until it is done or has failed."""
        with self._changed:
            waiting = next((job for job in self._waiting if job[0] == number), None)
            if waiting is not None:
                self._waiting.remove(waiting)
                self._finished.add(number)
            while number not in self._finished and self._alive:
                self._changed.wait()

    def wait(self, on_done: Callable[[int], None] = lambda done: None) -> list[Any]:
        """The answers to all jobs, in their order; `on_done` hears how many there are.

        Raises:
            InputError: a job failed, or a process ended; says why.
        """
        self._until_done(on_done, strict=True)
        if self._failures:
            raise self._failures[0]
        return [self._answers[number] for number in range(self._total)]

    def settle(self, on_done: Callable[[int], None] = lambda done: None) -> None:
        """Until every job is done or has failed."""
        self._until_done(on_done, strict=False)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for process in self._processes:
            process.close()

    def _until_done(self, on_done: Callable[[int], None], *, strict: bool) -> None:
        told, over = 0, False
        while not over:
            with self._changed:
                while len(self._answers) == told and not self._is_over(strict):
                    self._changed.wait()
                done, over = len(self._answers), self._is_over(strict)
            if done != told:
                told = done
                on_done(done)

    def _is_over(self, strict: bool) -> bool:
        return len(self._finished) >= self._total or not self._alive or (strict and bool(self._failures))

    def _serve(self, process: _Process, start: Sequence[bytes]) -> None:
        taken = None
        try:
            for frame in start:
                process.write(frame)
            while (taken := self._take()) is not None:
                number, job = taken
                answer = process.ask(job)
                with self._changed:
                    self._finished.add(number)
                    if isinstance(answer, dict) and "error" in answer:
                        self._failures.append(InputError(answer["error"]))
                    else:
                        self._answers[number] = answer
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failures.append(error)
                self._finished.update(() if taken is None else taken[:1])
        finally:
            with self._changed:
                self._alive -= 1
                self._changed.notify_all()

    def _take(self) -> tuple[int, Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return None if self._closed else self._waiting.popleft()


class _Process:
    """One builder: frames go to its standard input, answers come from its standard output."""

    def __init__(self, module: str, threads: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the builder
        variables = os.environ | {
            "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
            "PYTHONPATH": import_path(),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-X", "faulthandler", "-m", module], bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=variables, start_new_session=True,
            cwd=working_directory(),
        )

    def ask(self, job: Any) -> Any:
        """The answer to one job.

        Raises:
            InputError: the process ended.
        """
        self.write(json.dumps(job).encode())
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        return json.loads(line)

    def write(self, data: bytes) -> None:
        """Send one frame.

        Raises:
            InputError: the process ended.
        """
        assert self._process.stdin is not None
        try:
            write_frame(self._process.stdin, data)
        except OSError:
            raise self._gone() from None

    def close(self) -> None:
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with the compilers that it started: it leads their group
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError, ValueError):
                stream.close()  # type: ignore[union-attr]
        self._log.close()
        remove_unpacked(self._process.pid)

    def _gone(self) -> InputError:
        code = self._process.wait()
        if self._log.closed:
            return InputError("a process that compiles was ended")
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), size, 0).decode(errors="replace")
        # A crash report ends with a list of modules that is longer than the stack before it.
        lines = [line for line in text.splitlines() if not line.startswith("Extension modules:")]
        tail = "\n".join(lines)[-_TAIL_CHARACTERS:].strip()
        if code == -signal.SIGKILL:
            reason = "was killed (out of memory?); use fewer --jobs"
        elif code < 0:
            reason = f"crashed ({signal.strsignal(-code)})"
        else:
            reason = f"exited with code {code}"
        return InputError(f"a process that compiles {reason}" + (f"; its last output:\n{tail}" if tail else ""))


def serve_jobs(frames: int, begin: Callable[..., Callable[[Any], Any]]) -> None:
    """The builder's side: runs until the input ends.

    Args:
        frames: how many come before the first job.
        begin: called with these, returns the function that does a job and returns the answer (JSON values).
    """
    die_with(os.getppid())
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever compilers print must not end up among the answers
    try:
        work = begin(*(read_frame(_STDIN) for _ in range(frames)))
        while True:
            answer = work(json.loads(read_frame(_STDIN)))
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    except EOFError:
        return


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 8 << 20)
    return kib * 1024
