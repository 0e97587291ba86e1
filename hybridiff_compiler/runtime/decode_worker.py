"""A rank that only decodes: `python -m hybridiff_compiler.runtime.decode_worker`, started by `DecodeRanks`.

For decoding without a plan (benchmarks); under `parallelize` the ranks of the plan decode.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .connect import connect
from .decode_ranks import DecodeCall, DecodeRank, decoder_to_share
from .handover import pack_skeleton, raw_bytes, unpack_skeleton
from .nccl import ENVIRONMENT
from .processes import JOINED, READY, WorkerPool, open_store
from .settings import NumericSettings
from .transport import Channel, PeerError, Transport, allocate
from .worker_process import run_worker

__all__ = ["DecodeRanks", "main"]

_MODULE = "hybridiff_compiler.runtime.decode_worker"
_START_TIMEOUT_S = 600.0
_ORDER_BYTES = 64


class DecodeRanks:
    """A decoder on several processes, this one being rank 0."""

    def __init__(
        self, vae: nn.Module, call: DecodeCall, *, ranks: int, backend: str, threads: int = 1, timeout_s: float = 120.0,
        on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        """Starts the processes and builds everything.

        Args:
            vae: on rank 0's device, with weights in the dtype of `call`.
            call: what is decoded.
            ranks: 2 or more; on GPUs the vae's and the first others.
            backend: see `hybridiff_compiler.backends`.
            threads: CPU threads per rank.
            timeout_s: how long to wait for another rank.
            on_progress: called with (what, done, total).

        Raises:
            WorkerError: a process failed.
            InputError, UsageError: see `DecodeRank`.
        """
        device = next(vae.parameters()).device
        first = device.index or 0
        others = [index for index in range(ranks + 1) if index != first]
        devices = [device, *(torch.device(device.type, index) for index in others)][:ranks]
        decoder = decoder_to_share(vae, call.shape, call.torch_dtype)
        self.rank = DecodeRank(decoder, call, rank=0, ranks=ranks, device=device, backend=backend)
        skeleton, tensors = pack_skeleton(decoder)
        store = open_store()
        is_cuda = device.type == "cuda"
        self._pool = WorkerPool(
            ranks, store, threads=threads, environment=ENVIRONMENT if is_cuda else {}, module=_MODULE)
        self._transport: Transport | None = None
        try:
            start = {
                "host": "127.0.0.1", "port": store.port, "ranks": ranks, "call": call.to_json(), "backend": backend,
                "devices": [str(d) if is_cuda else "cpu" for d in devices],
                "settings": NumericSettings.current().to_json(),
            }
            for rank in range(1, ranks):
                self._pool.send_frame(rank, json.dumps(start).encode())
                self._pool.send_frame(rank, skeleton)
            self._pool.wait_for(JOINED, timeout_s=_START_TIMEOUT_S)
            self._transport = connect(store, 0, ranks, timeout_s=timeout_s, device=device)
            self._transport.broadcast([raw_bytes(tensor) for tensor in tensors if tensor.numel()])
            self.rank.prepare(lambda done, total: on_progress("building graphs of bands", done, total))
            self._pool.wait_for(READY, timeout_s=_START_TIMEOUT_S)
        except (PeerError, RuntimeError) as error:
            failure = self._pool.failure("starting", suspect=getattr(error, "peer", None))
            self.close()
            raise failure from error
        except BaseException:
            self.close()
            raise

    def decode(self, latents: Tensor) -> Tensor:
        """The image, computed by all ranks.

        Raises:
            WorkerError: a rank failed; close this object.
        """
        assert self._transport is not None
        try:
            order = allocate(_ORDER_BYTES)
            works = [
                (peer, self._transport.send_bytes(peer, Channel.ORDERS, order)) for peer in range(1, self.rank.ranks)
            ]
            image = self.rank.decode(latents, self._transport)
            for peer, work in works:
                self._transport.wait(work, peer, "sending to")
        except PeerError as error:
            silent = [error.peer] if error.timed_out else []
            raise self._pool.failure(
                "the decoding of an image", silent=silent, timeout_s=self._transport.timeout_s or 0.0,
                suspect=error.peer,
            ) from None
        return image

    def close(self) -> None:
        """End the processes."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()
        self._pool.close()

    def __enter__(self) -> DecodeRanks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@torch.no_grad()
def _serve(rank: int, start: dict[str, Any], skeleton: bytes, store: dist.Store) -> None:
    NumericSettings(**start["settings"]).apply()
    device = torch.device(start["devices"][rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    decoder, tensors = unpack_skeleton(skeleton, device)
    store.set(f"{JOINED}/{rank}", "")
    transport = connect(store, rank, start["ranks"], timeout_s=None, device=device)
    transport.broadcast([raw_bytes(tensor) for tensor in tensors if tensor.numel()])
    part = DecodeRank(
        decoder, DecodeCall.parse(start["call"]), rank=rank, ranks=start["ranks"], device=device,
        backend=start["backend"],
    )
    part.prepare()
    store.set(f"{READY}/{rank}", "")
    order = allocate(_ORDER_BYTES)
    while True:
        transport.receive_bytes(0, Channel.ORDERS, order).wait()
        part.serve(transport)


def main() -> None:
    """Entry point of the process."""
    run_worker(lambda rank, start, frames, store: _serve(rank, start, frames[0], store), frames=1)


if __name__ == "__main__":
    main()
