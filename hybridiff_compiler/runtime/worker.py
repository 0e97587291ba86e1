"""A worker process: `python -m hybridiff_compiler.runtime.worker`, started by `processes.WorkerPool` and nobody else.

It gets a start message and the denoiser's skeleton on standard input, joins the other ranks, and then does what the
driver's orders say until that input closes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .serving import Server
from .settings import NumericSettings
from .worker_process import run_worker

__all__ = ["main"]


def main() -> None:
    """Entry point of the process."""
    servers: list[Server] = []

    def serve(rank: int, start: dict[str, Any], frames: Sequence[bytes], store: dist.Store) -> None:
        NumericSettings(**start["settings"]).apply()
        torch.set_num_interop_threads(1)
        servers.append(Server(rank, start, frames[0], store))
        servers[0].serve()

    run_worker(serve, frames=1, step=lambda: servers[0].step if servers else None)


if __name__ == "__main__":
    main()
