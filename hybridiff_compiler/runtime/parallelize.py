"""`parallelize`: run an unmodified pipeline by a plan, on as many processes as the plan has ranks."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ir import InputError, Plan, PlanMismatchError, UsageError
from .building import RankBuild
from .connect import connect
from .decode_ranks import DecodeRank
from .decode_route import DecodeMode, choose_decoding, faster, routed
from .driver import Driver
from .executor import RankExecutors, graphs_for
from .handover import pack_skeleton, raw_bytes
from .intercept import find_denoiser, intercept, is_intercepted
from .nccl import ENVIRONMENT, NcclTransport
from .processes import HELD, JOINED, READY, Pool, WorkerPool, open_store
from .segments import is_bundle
from .settings import NumericSettings
from .stage_weights import closed_forward, held_bytes, held_numbers, only_held, send_held
from .torchrun import TorchrunPool, is_one_host, neighbour_count, own_device, own_rank, rendezvous, serve_rank
from .transport import PeerError, Transport
from .watch import DeviceWatch

if TYPE_CHECKING:
    from ..bundle import Bundle

__all__ = ["ParallelPipeline", "parallelize"]

_DECODE_BACKEND = "eager"
"""Of decoders: an image is decoded once per generation, so graphs that are ready in seconds are worth more than fused
ones that take minutes to compile. On GPUs they are replayed as CUDA graphs."""
_START_TIMEOUT_S = 600.0
"""Longest time for a worker to import, take the weights and build its graphs; a dead one is noticed at once."""


def parallelize(
    pipe: Any,
    plan: Plan | Bundle | str | os.PathLike[str],
    *,
    devices: Sequence[str | torch.device] | None = None,
    timeout_s: float = 60.0,
    threads: int | None = None,
    backend: str | None = None,
    batch_sizes: Sequence[int] = (1,),
    decode: DecodeMode = "pipeline",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ParallelPipeline:
    """Start the workers of `plan` and route the denoiser calls of `pipe` through it, until closed.

    Use as `with parallelize(pipe, plan): pipe(...)`, or call `close()` on the result. The pipeline itself is not
    changed; calls that the plan does not cover run as if it were not there.

    Under torchrun, which starts one process per rank, rank 0 is the driver and goes on as above; in the other ranks
    this call serves it, and ends the process when rank 0 ends.

    Args:
        pipe: a diffusers pipeline whose denoiser is on the first rank's device.
        plan: what to run: a plan, its file, or a bundle or its folder, which is loaded without compiling.
        devices: one per rank; default: the CPU, or on GPUs the denoiser's and then the others in order.
        timeout_s: seconds after which a worker that does not answer within a step counts as hung; one that died is
            noticed at once. On GPUs both take five times as long when a callback waits for the device without letting
            other Python threads run (indexing with a tensor on the GPU does).
        threads: CPU threads per rank, also of this process while the plan is active; default: the processors that
            this process may use, divided by the number of ranks.
        backend: see `hybridiff_compiler.backends`; default: eager on CPUs, inductor on GPUs, where the graphs are
            always replayed as CUDA graphs.
        batch_sizes: numbers of images per call to have graphs ready for; others are built when they first occur.
        decode: who decodes images, see `decode_route.MODES`: `pipeline` (as it comes), `driver` (one graph),
            `rows` (all ranks, a band each; equal up to rounding), or `auto` (on GPUs what is fastest when measured).
        on_progress: called with (what, done, total) while graphs are built, which can take minutes.

    Raises:
        PlanMismatchError: the plan is for another model, or for other devices.
        UsageError: an argument that can never work.
        WorkerError: a worker could not be started.
        SystemExit: in ranks other than 0 under torchrun.
    """
    from ..bundle import resolve_plan

    plan, backend = resolve_plan(plan, backend)
    if (rank := own_rank()) and plan.world_size > 1:
        serve_rank(plan, rank)
    return ParallelPipeline(
        pipe, plan, devices=devices, timeout_s=timeout_s, threads=threads, backend=backend, batch_sizes=batch_sizes,
        decode=decode, on_progress=on_progress,
    )


class ParallelPipeline:
    """A pipeline that runs by a plan; `parallelize` makes it."""

    def __init__(
        self, pipe: Any, plan: Plan, *, devices: Sequence[str | torch.device] | None, timeout_s: float,
        threads: int | None, backend: str | None = None, batch_sizes: Sequence[int] = (1,),
        decode: DecodeMode = "pipeline", on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        if timeout_s <= 0:
            raise UsageError(f"timeout_s must be positive, got {timeout_s}")
        threads = _threads_per_rank(plan.world_size) if threads is None else threads
        if threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        if not batch_sizes or min(batch_sizes) < 1:
            raise UsageError(f"batch_sizes must be numbers of images, 1 or more, got {list(batch_sizes)}")
        self._batch_sizes = sorted(set(batch_sizes))
        _, denoiser = find_denoiser(pipe)
        self._devices = assign_devices(plan, denoiser, devices)
        if is_intercepted(denoiser):
            raise UsageError("this pipeline runs by a plan already; close that first, or give it another plan by use()")
        self._denoiser = denoiser
        self._decoding = choose_decoding(pipe, plan, decode, self._devices[0])
        self._decode_seconds: dict[str, float] = {}
        self._decoded_by = "pipeline"
        self.plan = plan
        self._resources = contextlib.ExitStack()
        # Closes at the latest when the interpreter exits; refers to the resources only, not to this object.
        self._finalizer = weakref.finalize(self, self._resources.close)
        self._pool: Pool | None = None
        self._transport: Transport | None = None
        try:
            default = "eager" if self._devices[0].type == "cpu" else "inductor"
            self._start(pipe, denoiser, timeout_s, threads, backend or default, on_progress)
        except BaseException:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether the plan is active."""
        return self._finalizer.alive

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers, from rank 1 on."""
        return () if self._pool is None else self._pool.pids

    @property
    def transport(self) -> Transport | None:
        """Rank 0's transport, with its counts of messages and bytes sent; None in a world of one rank."""
        return self._transport

    @property
    def executed(self) -> tuple[str, ...]:
        """Pattern names of the present or last generation's steps so far."""
        return tuple(self._driver.executed)

    @property
    def decode_seconds(self) -> dict[str, float]:
        """With `decode="auto"` what one image took to decode, by `driver` and by `rows`; else empty."""
        return dict(self._decode_seconds)

    @property
    def decoded_by(self) -> str:
        """Who decodes images: `pipeline`, `driver` or `rows`; never `auto`."""
        return self._decoded_by

    def use(self, plan: Plan) -> None:
        """Follow `plan` from the next generation on, with the workers and graphs at hand (takes no time).

        Raises:
            PlanMismatchError: it is not for the same model and ranks, or names tables that this object was not
                started with.
            UsageError: closed already.
        """
        if not self.is_open:
            raise UsageError("this parallel pipeline is closed; call parallelize again")
        if (plan.model, plan.ranks) != (self.plan.model, self.plan.ranks):
            raise PlanMismatchError("the plan is for another model or other ranks than the workers were started for")
        partitions = {p.name: p for p in self.plan.partitions}
        unknown = [p.name for p in plan.patterns if p not in self.plan.patterns]
        unknown += [p.name for p in plan.partitions if partitions.get(p.name) != p]
        if unknown:
            raise PlanMismatchError(
                f"the workers were not started with tables {unknown}; they know {[p.name for p in self.plan.patterns]} "
                f"on {sorted(partitions)}; call parallelize with a plan that holds all of them"
            )
        self._driver.use(plan)

    def stage_seconds(self, pattern: str) -> list[float]:
        """Time of every rank's stage graphs of a step of `pattern`, without transfers; between generations only."""
        return self._driver.stage_seconds(pattern)

    def peak_bytes(self) -> list[int]:
        """Most memory of every rank so far, on its GPU or else resident in its process; between generations only."""
        return self._driver.peak_bytes()

    def held_bytes(self) -> list[int]:
        """Memory of every rank for the denoiser's parameters, as they are held now."""
        own = held_bytes(self._denoiser)
        if self.plan.weights == "whole" or self._pool is None:
            return [own] * self.plan.world_size
        return [own, *(int(self._pool.answer(f"{HELD}/{rank}")) for rank in range(1, self.plan.world_size))]

    def traced(self, target: str | os.PathLike[str]) -> AbstractContextManager[None]:
        """A context that records the kernels and transfers of all ranks, on one time axis, to `target`.

        The file is a gzipped Chrome trace (`trace.json.gz`), for Perfetto or chrome://tracing. Only ranks of one host.
        """
        return self._driver.traced(Path(target))

    def bypassed(self) -> AbstractContextManager[None]:
        """A context in which the pipeline runs as if there were no plan."""
        return self._driver.bypassed()

    def close(self) -> None:
        """End the workers and restore the pipeline; does nothing when closed already."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __del__(self) -> None:
        finalizer = getattr(self, "_finalizer", None)
        if finalizer is not None and finalizer.alive:
            warnings.warn(
                "hybridiff: the object that parallelize returned was dropped, which ends its workers; keep it, or use "
                "`with parallelize(...)`",
                stacklevel=2,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(
        self, pipe: Any, denoiser: nn.Module, timeout_s: float, threads: int, backend: str,
        on_progress: Callable[[str, int, int], None] | None,
    ) -> None:
        settings = NumericSettings.current()
        self._resources.callback(settings.apply)
        torch.set_num_threads(threads)
        plan = self.plan
        # A bundle is looked at first, since that takes no time; a capture while the workers import what they need.
        captured = graphs_for(plan, denoiser, backend) if is_bundle(backend) or plan.world_size == 1 else None
        neighbours = 1
        if plan.world_size > 1:
            shared = self._decoding if self._decoding is not None and self._decoding.on_all_ranks else None
            skeleton, tensors = pack_skeleton(
                denoiser if shared is None else nn.ModuleList([denoiser, shared.decoder])
            )
            if own_rank() is not None:
                store = rendezvous(plan)
                self._pool = TorchrunPool(store, plan.world_size)
                neighbours = neighbour_count()
                address: dict[str, Any] = {"one_host": is_one_host(), "neighbours": neighbours}
            else:
                served = store = open_store()
                environment = ENVIRONMENT if self._devices[0].type == "cuda" else {}
                self._pool = WorkerPool(plan.world_size, store, threads=threads, environment=environment)
                neighbours = plan.world_size
                address = {"one_host": True, "neighbours": neighbours, "host": "127.0.0.1", "port": served.port}
            self._resources.callback(self._pool.close)
            captured = captured or graphs_for(plan, denoiser, backend)
            held = None
            if plan.weights == "stages":
                everywhere = [] if shared is None else [*shared.decoder.parameters(), *shared.decoder.buffers()]
                held = held_numbers(plan, denoiser, captured, tensors, everywhere)
            self._hand_over(store, address, skeleton, tensors, timeout_s, backend, held)
            if held is not None:
                moves = next(denoiser.parameters()).device != self._devices[0]
                self._resources.enter_context(only_held(tensors, held[0], self._devices[0]))
                self._resources.enter_context(closed_forward(denoiser))
                captured = graphs_for(plan, denoiser, backend) if moves else captured
        assert captured is not None
        executors = RankExecutors(plan, denoiser, captured, rank=0, transport=self._transport, backend=backend)
        report = on_progress or (lambda what, done, total: None)
        building = RankBuild(
            plan, denoiser, executors, self._batch_sizes, rank=0, backend=backend, neighbours=neighbours
        )
        helpers = f" in {building.helpers + 1} processes" if building.helpers else ""
        building.run(lambda done, total: report(f"building stage graphs{helpers}", done, total))
        parts = self._decode_parts(report)
        if self._pool is not None:
            self._pool.wait_for(READY, timeout_s=_START_TIMEOUT_S)
        watch = None
        if self._pool is not None and isinstance(self._transport, NcclTransport):
            watch = DeviceWatch(self._pool, self._transport, self._devices[0])
            self._resources.callback(watch.close)
        self._driver = Driver(
            self.plan, denoiser, executors, transport=self._transport, pool=self._pool, close=self._finalizer,
            watch=watch,
        )
        settle = None if watch is None else self._driver.settle
        self._resources.enter_context(intercept(pipe, self._driver, settle=settle))
        self._route_decodes(parts)

    def _decode_parts(self, report: Callable[[str, int, int], None]) -> dict[str, DecodeRank]:
        """Rank 0's part of every way to decode that may be used, ready to run."""
        decoding, parts = self._decoding, {}
        if decoding is not None:
            worlds = {"driver": 1, "rows": self.plan.world_size}
            for way in worlds if decoding.mode == "auto" else [decoding.mode]:
                parts[way] = part = DecodeRank(
                    decoding.decoder, decoding.call, rank=0, ranks=worlds[way], device=self._devices[0],
                    backend=_DECODE_BACKEND,
                )
                part.prepare(lambda done, total: report("building graphs of the decoder", done, total))
        return parts

    def _route_decodes(self, parts: Mapping[str, DecodeRank]) -> None:
        decoding, driver = self._decoding, self._driver
        if decoding is None:
            return
        ways = {way: partial(driver.decode, part) for way, part in parts.items()}
        way = next(iter(ways))
        if len(ways) > 1:
            call = decoding.call
            latents = torch.zeros(call.shape, dtype=call.torch_dtype, device=self._devices[0])
            way, self._decode_seconds = faster(ways, latents)
        self._decoded_by = way
        self._resources.enter_context(routed(decoding, ways[way], lambda: driver.is_bypassed))

    def _hand_over(
        self, store: dist.Store, address: dict[str, Any], skeleton: bytes, tensors: list[Tensor], timeout_s: float,
        backend: str, held: list[list[int]] | None,
    ) -> None:
        """Give the workers plan and denoiser, and connect to them."""
        plan, pool = self.plan, self._pool
        assert pool is not None
        start = {
            "plan": plan.model_dump_json(), "backend": backend,
            "settings": NumericSettings.current().to_json(), "devices": [str(device) for device in self._devices],
            "batch_sizes": self._batch_sizes, "decode_backend": _DECODE_BACKEND,
            "held": held, "decode": None if self._decoding is None else self._decoding.call.to_json(),
        } | address
        for rank in range(1, plan.world_size):
            pool.send_frame(rank, json.dumps(start).encode())
            pool.send_frame(rank, skeleton)
        pool.wait_for(JOINED, timeout_s=_START_TIMEOUT_S)
        try:
            transport = self._transport = connect(
                store, 0, plan.world_size, timeout_s=timeout_s, device=self._devices[0], one_host=address["one_host"],
            )
            self._resources.callback(transport.close)
            if held is None:
                transport.broadcast([raw_bytes(tensor) for tensor in tensors if tensor.numel()])
            else:
                send_held(transport, tensors, held)
        except (PeerError, RuntimeError) as error:
            raise pool.failure("starting", suspect=getattr(error, "peer", None)) from error


def _threads_per_rank(world_size: int) -> int:
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)) // world_size)
    return max(1, (os.cpu_count() or 1) // world_size)


def assign_devices(
    plan: Plan, denoiser: nn.Module, devices: Sequence[str | torch.device] | None
) -> list[torch.device]:
    """The device of every rank; also checks what can be told before any work.

    Raises:
        PlanMismatchError, UsageError, InputError: see `parallelize`.
    """
    name = type(denoiser).__name__
    if plan.model.denoiser != name:
        raise PlanMismatchError(
            f"the plan was made for a {plan.model.denoiser} ({plan.model.name}), this pipeline has a {name}; "
            "profile this model and plan again"
        )
    planned = [spec.device for spec in plan.ranks]
    kinds = planned if devices is None else [torch.device(device).type for device in devices]
    if kinds != planned:
        raise PlanMismatchError(f"the plan is for {len(planned)} ranks on {planned}, got devices {kinds}")
    if len(set(planned)) > 1:
        raise UsageError(f"ranks on {sorted(set(planned))}: all ranks of a plan must be on one kind of device")
    own = next(denoiser.parameters()).device
    if planned[0] == "cpu":
        assigned = [torch.device("cpu")] * len(planned)
    elif own_rank() is not None and len(planned) > 1:
        assigned = [own_device("cuda")] * len(planned)  # every rank knows its own; the others may be on other hosts
    else:
        count = torch.cuda.device_count()
        if count < len(planned):
            raise UsageError(f"the plan is for {len(planned)} GPUs, this machine has {count} that torch can use")
        first = own.index if own.type == "cuda" and own.index is not None else 0
        order = [first, *(index for index in range(count) if index != first)]
        assigned = [torch.device("cuda", index) for index in order[:len(planned)]]
        if devices is not None:
            indices = [torch.device(device).index for device in devices]
            assigned = [d if i is None else torch.device("cuda", i) for d, i in zip(assigned, indices)]
        if len(set(assigned)) < len(assigned):
            raise UsageError(f"every rank needs a GPU of its own, got {[str(device) for device in assigned]}")
    waiting = plan.weights == "stages" and own.type == "cpu"  # its own stages are moved there
    if not waiting and (own.type != planned[0] or (own.type == "cuda" and own != assigned[0])):
        raise InputError(
            f"the denoiser is on {own}, rank 0 of the plan on {assigned[0]}; move it with pipe.to({str(assigned[0])!r})"
        )
    return assigned
