"""`parallelize`: run an unmodified pipeline by a plan, on as many processes as the plan has ranks."""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from ..ir import Plan, PlanMismatchError, UsageError
from .assignment import assign_devices, threads_per_rank
from .building import RankBuild
from .decode_ranks import DecodeRank
from .decode_route import DecodeMode, choose_decoding, decode_parts, faster, routed
from .driver import Driver
from .executor import RankExecutors
from .intercept import find_denoiser, intercept, is_intercepted
from .nccl import NcclTransport
from .processes import HELD, READY, Pool
from .stage_weights import held_bytes
from .starting import START_TIMEOUT_S, Order, start_workers
from .torchrun import own_rank, serve_rank
from .transport import Transport
from .watch import DeviceWatch

if TYPE_CHECKING:
    from ..bundle import Bundle

__all__ = ["ParallelPipeline", "assign_devices", "parallelize"]


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
        threads = threads_per_rank(plan.world_size) if threads is None else threads
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
        self._check_open()
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
        self._check_open()
        return self._driver.stage_seconds(pattern)

    def peak_bytes(self) -> list[int]:
        """Most memory of every rank so far, on its GPU or else resident in its process; between generations only."""
        self._check_open()
        return self._driver.questions.peak_bytes()

    def held_bytes(self) -> list[int]:
        """Memory of every rank for the denoiser's parameters, as they are held now."""
        self._check_open()
        own = held_bytes(self._denoiser)
        if self.plan.weights == "whole" or self._pool is None:
            return [own] * self.plan.world_size
        return [own, *(int(self._pool.answer(f"{HELD}/{rank}")) for rank in range(1, self.plan.world_size))]

    def traced(self, target: str | os.PathLike[str]) -> AbstractContextManager[None]:
        """A context that records the kernels and transfers of all ranks, on one time axis, to `target`.

        The file is a gzipped Chrome trace (`trace.json.gz`), for Perfetto or chrome://tracing. Only ranks of one host.
        """
        self._check_open()
        return self._driver.questions.traced(Path(target))

    def bypassed(self) -> AbstractContextManager[None]:
        """A context in which the pipeline runs as if there were no plan."""
        return self._driver.bypassed()

    def _check_open(self) -> None:
        if not self.is_open:
            raise UsageError("this parallel pipeline is closed; call parallelize again")

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
        self._resources.enter_context(_threads(threads))
        plan, device = self.plan, self._devices[0]
        started = start_workers(
            Order(
                plan=plan, denoiser=denoiser, devices=self._devices, batch_sizes=self._batch_sizes, backend=backend,
                threads=threads, timeout_s=timeout_s, decoding=self._decoding,
            ),
            self._resources,
        )
        pool, transport = self._pool, self._transport = started.pool, started.transport
        executors = RankExecutors(plan, denoiser, started.captured, rank=0, transport=transport, backend=backend)
        report = on_progress or (lambda what, done, total: None)
        building = RankBuild(
            plan, denoiser, executors, self._batch_sizes, rank=0, backend=backend, neighbours=started.neighbours
        )
        helpers = f" in {building.helpers + 1} processes" if building.helpers else ""
        building.run(lambda done, total: report(f"building stage graphs{helpers}", done, total))
        parts = decode_parts(self._decoding, plan.world_size, device, report)
        watch = None
        if pool is not None:
            pool.wait_for(READY, timeout_s=START_TIMEOUT_S)
            if isinstance(transport, NcclTransport):
                watch = DeviceWatch(pool, transport, device)
                self._resources.callback(watch.close)
        self._driver = Driver(
            plan, denoiser, executors, transport=transport, pool=pool, close=self._finalizer, watch=watch,
        )
        settle = None if watch is None else self._driver.settle
        self._resources.enter_context(intercept(
            pipe, self._driver, settle=settle, exact_at=self._driver.is_exact_at, left=self._driver.finish
        ))
        self._route_decodes(parts)

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


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """While open, operations use so many threads; then as many as before, unless somebody chose others meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() == count != before:
            torch.set_num_threads(before)
