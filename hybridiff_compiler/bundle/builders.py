"""Building the stage graphs of a plan in several processes: a compiler keeps one core busy for minutes per graph.

Each builder process gets the denoiser without its weights, puts random ones in their place, captures it, and compiles
the graphs that it is given. So this is for backends whose artifacts hold no weights, and it makes sure of that: nothing
that a compiler could learn from the weights' values ends up in an artifact.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import nn

from ..backends.target import Target
from ..ir import InputError, Plan
from ..runtime.handover import pack_skeleton
from ..runtime.processes import write_frame

__all__ = ["BuildOrder", "build_in_processes", "default_jobs"]

_BYTES_PER_BUILDER = 2.0
"""Memory of a builder, in sizes of the denoiser's weights, besides what a process takes anyway."""
_BYTES_PER_PROCESS = 3 << 30
_TAIL_CHARACTERS = 4000


@dataclass(frozen=True)
class BuildOrder:
    """One artifact to build."""

    digest: str
    """Of the stage graph."""
    name: str
    """Of the file, without its ending."""


def default_jobs(graphs: int, denoiser: nn.Module, cores: int | None = None, free: int | None = None) -> int:
    """How many builders this machine has cores and memory for.

    Args:
        graphs: stage graphs to build.
        denoiser: the network on its device.
        cores: processors (default: those that this process may use).
        free: bytes of memory that builders may take on the denoiser's device (default: what is free now).
    """
    parameter = next(denoiser.parameters())
    cores = _cores() if cores is None else cores
    free = _free_bytes(parameter.device) if free is None else free
    weights = sum(p.nbytes for p in denoiser.parameters())
    each = int(_BYTES_PER_BUILDER * weights) + (0 if parameter.is_cuda else _BYTES_PER_PROCESS)
    return max(1, min(graphs, cores // 2, free // max(1, each)))


def build_in_processes(
    plan: Plan, denoiser: nn.Module, backend: str, target: Target, folder: Path, orders: Sequence[BuildOrder],
    *, jobs: int, on_built: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Build all `orders` in `jobs` processes.

    Args:
        plan: whose graphs they are.
        denoiser: the network; its weights are not sent.
        backend: its name; one whose artifacts hold no weights.
        target: what to build for.
        folder: where the files go.
        orders: what to build; the first ones first.
        jobs: number of processes.
        on_built: called with the number of finished ones.

    Returns:
        The files, in the order of `orders`.

    Raises:
        InputError: a graph could not be compiled; says why.
    """
    skeleton, _ = pack_skeleton(denoiser)
    start = {
        "plan": plan.model_dump_json(), "backend": backend, "target": target.model_dump_json(), "folder": str(folder),
        "device": str(next(denoiser.parameters()).device), "threads": max(1, _cores() // jobs),
    }
    waiting: SimpleQueue[BuildOrder] = SimpleQueue()
    for order in orders:
        waiting.put(order)
    files: dict[str, Path] = {}
    failures: list[BaseException] = []
    changed = threading.Condition()
    builders: list[_Builder] = []

    def serve(builder: _Builder) -> None:
        try:
            builder.begin(start, skeleton)
            while not failures:
                order = waiting.get_nowait()
                file = builder.build(order)
                with changed:
                    files[order.digest] = file
                    changed.notify()
        except Empty:
            pass
        except BaseException as error:
            with changed:
                failures.append(error)
                changed.notify()

    try:
        builders = [_Builder(start["threads"]) for _ in range(min(jobs, len(orders)))]
        for builder in builders:
            threading.Thread(target=serve, args=(builder,), daemon=True).start()
        done = 0
        while done < len(orders):
            with changed:
                while len(files) == done and not failures:
                    changed.wait()
                if failures:
                    raise failures[0]
                done = len(files)
            on_built(done)
    finally:
        for builder in builders:
            builder.close()
    return [files[order.digest] for order in orders]


class _Builder:
    """One builder process: orders go to its standard input, answers come from its standard output."""

    def __init__(self, threads: Any) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the builder
        variables = os.environ | {
            "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "hybridiff_compiler.bundle.builder"], bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=variables, start_new_session=True,
        )

    def begin(self, start: dict[str, Any], skeleton: bytes) -> None:
        """Hand over what does not change from graph to graph."""
        self._write(json.dumps(start).encode())
        self._write(skeleton)

    def build(self, order: BuildOrder) -> Path:
        """Have one graph compiled.

        Raises:
            InputError: it could not be, or the process ended.
        """
        self._write(json.dumps([order.digest, order.name]).encode())
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(answer["error"])
        return Path(answer["file"])

    def close(self) -> None:
        """End the process and the compilers that it started, whatever they are doing."""
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)  # it leads a group of its own
        self._process.wait()
        self._log.close()

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            write_frame(self._process.stdin, data)
        except OSError:
            raise self._gone() from None

    def _gone(self) -> InputError:
        code = self._process.wait()
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 8 << 20)
    return kib * 1024
