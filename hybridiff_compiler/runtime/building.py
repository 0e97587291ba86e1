"""Building all graphs of a rank, with the help of other processes.

For backends that leave what they compiled in a cache on disk. A file there notes every graph that is in it, so that
later starts go straight to the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ..backends import LAZY
from ..backends.stage_io import stage_digest
from ..ir import InputError, Plan
from .ahead import Builders, default_jobs, own_cores
from .executor import RankExecutors
from .handover import pack_skeleton
from .settings import NumericSettings

__all__ = ["RankBuild"]

_MODULE = "hybridiff_compiler.runtime.builder"
_WORTH_HELP = 2
"""Missing graphs from which on helpers pay: they take a while to start, and what they built still has to be loaded."""
_OWN_CORES = 2
"""That a rank needs for building beside its helpers."""


class RankBuild:
    """The graphs of one rank, for some numbers of images per call, and the processes that help to build them."""

    def __init__(
        self, plan: Plan, denoiser: nn.Module, executors: RankExecutors, batch_sizes: Sequence[int], *, rank: int,
        backend: str, neighbours: int, jobs: int | None = None,
    ) -> None:
        """
        Args:
            plan: the tables.
            denoiser: the network on the rank's device.
            executors: the rank's.
            batch_sizes: numbers of images per call.
            rank: this one.
            backend: see `hybridiff_compiler.backends`.
            neighbours: ranks that compile on the same host at the same time, this one included.
            jobs: processes beside this one, if any are needed; default: as many as there are cores and memory for.
        """
        self._plan, self._denoiser, self._executors = plan, denoiser, executors
        self._rank, self._backend = rank, backend
        self._device = next(denoiser.parameters()).device
        self._settings = NumericSettings.current()
        self._graphs = [
            (images, number) for images in batch_sizes for number in range(len(executors.at(images).segments))
        ]
        self._notes: dict[tuple[int, int], Path] = {}
        """Of the graphs that are not in the compiler's cache."""
        if backend in LAZY:
            for images, number in self._graphs:
                executor = executors.at(images)
                note = self._note(stage_digest(executor.runner.stage(executor.segments[number])))
                if not note.exists():
                    self._notes[images, number] = note
        if len(self._notes) < _WORTH_HELP:
            self.helpers = 0
        else:
            self.helpers = jobs or default_jobs(
                len(self._notes) - 1, denoiser, cores=own_cores() // neighbours - _OWN_CORES, least=0
            )
            """How many processes build beside this one."""

    @property
    def missing(self) -> int:
        """Graphs that are not in the compiler's cache."""
        return len(self._notes)

    def run(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Build every graph.

        This process begins with the first one, the others with the last ones; what they have compiled is only loaded
        here. What they fail at is left to this process, which can say why.

        Args:
            on_progress: called with (done, total).
        """
        ahead = [graph for graph in reversed(self._graphs) if graph in self._notes]
        with self._start_helpers() as builders:
            builders.start(ahead)
            for done, (images, number) in enumerate(self._graphs):
                on_progress(done, len(self._graphs))
                if (images, number) in self._notes:
                    builders.claim(ahead.index((images, number)))
                executor = self._executors.at(images)
                executor.runner.prepare([executor.segments[number]])
        on_progress(len(self._graphs), len(self._graphs))
        for note in self._notes.values():
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
        self._notes.clear()

    def _start_helpers(self) -> Builders:
        start = {
            "plan": self._plan.model_dump_json(), "rank": self._rank, "backend": self._backend,
            "device": str(self._device), "settings": self._settings.to_json(),
        }
        try:
            frame = pack_skeleton(self._denoiser)[0] if self.helpers else b""
        except InputError:  # no other process can have this denoiser
            return Builders(_MODULE, (), 0)
        return Builders(_MODULE, (json.dumps(start).encode(), frame), self.helpers)

    def _note(self, digest: str) -> Path:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        on_gpu = self._device.type == "cuda"
        machine = torch.cuda.get_device_name(self._device) if on_gpu else self._settings.to_json()
        text = json.dumps([digest, self._backend, torch.__version__, str(self._device), machine])
        return Path(cache_dir()) / "hybridiff" / hashlib.sha256(text.encode()).hexdigest()
