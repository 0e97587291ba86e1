"""Rank 0: the step handler that runs a plan's schedule together with the workers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..backends.kept import Moment
from ..ir import Branch, CallSignature, Plan, PlanMismatchError, UsageError
from .branch_calls import batch_factor, scale_signature
from .decode_ranks import DecodeRank
from .estimates import EstimateMemory
from .executor import RankExecutors
from .intercept import GuidedCall
from .live_weights import LiveWeights
from .orders import DECODING, MAX_MISSED, Order, OrderOutbox
from .processes import RESIZED, Pool
from .questions import Questions
from .schedule_state import ScheduleState
from .transport import PeerError, Transport
from .watch import DeviceWatch

__all__ = ["Driver"]

_CHANGED = (
    "the denoiser's weights or modules changed after parallelize (or their settings, such as FreeU's), which must be "
    "called again to run by the plan"
)
_BUILD_TIMEOUT_S = 600.0
"""Longest time for the workers to build graphs of another batch size; a dead one is noticed at once."""


class Driver:
    """A `StepHandler` that gives every step's orders to the workers and does rank 0's part itself."""

    def __init__(
        self,
        plan: Plan,
        denoiser: nn.Module,
        executors: RankExecutors,
        *,
        transport: Transport | None,
        pool: Pool | None,
        close: Callable[[], None],
        watch: DeviceWatch | None = None,
    ) -> None:
        """
        Args:
            plan: the tables.
            denoiser: whose weights the ranks hold.
            executors: rank 0's.
            transport: to the workers; None in a world of one rank.
            pool: the workers, to find out why one failed; None in a world of one rank.
            close: ends the workers and removes the hooks; called when a step cannot be finished.
            watch: looks after the workers while the host runs ahead of the devices; None on CPUs.
        """
        self.plan = self._next_plan = plan
        self._owner = os.getpid()
        self.executed: list[str] = []
        """Pattern names of the current generation so far."""
        self._denoiser, self._executors, self._transport, self._pool = denoiser, executors, transport, pool
        self._executor, self._images = executors.at(1), 1
        self._close, self._watch = close, watch
        self._weights = LiveWeights(denoiser)
        self._schedule = ScheduleState(plan.schedule)
        self._estimates = EstimateMemory()
        self._outbox = None if transport is None else OrderOutbox(transport, plan.model.signature, plan.num_steps)
        self._index = {pattern.name: index for index, pattern in enumerate(plan.patterns)}
        self.questions = Questions(
            next(denoiser.parameters()).device, plan.world_size, self._index, pool, self._ask, self._fail
        )
        self._missed: dict[int, list[int]] = {rank: [] for rank in range(1, plan.world_size)}
        self._generation = self._resizes = 0
        self._step = 0
        self._bypass = self._unchecked = False
        self._said: set[str] = set()

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """While open, no generation is covered."""
        self._bypass = True
        try:
            yield
        finally:
            self._bypass = False

    def use(self, plan: Plan) -> None:
        """Follow another plan from the next generation on; its patterns must be among those that the ranks know."""
        self._next_plan = plan

    def stage_seconds(self, name: str) -> list[float]:
        """See `Questions.stage_seconds`."""
        return self.questions.stage_seconds(name, self._executor)

    def _ask(self, rank: int, kind: int, pattern: int | None, number: int) -> None:
        """Send an order between generations."""
        self._check_owner()
        assert self._outbox is not None
        self._outbox.send(rank, Order(self._generation, kind, pattern, number), ())

    def _check_owner(self) -> None:
        """
        Raises:
            UsageError: in a child that was forked later.
        """
        if os.getpid() != self._owner:
            raise UsageError(
                f"parallelize was called in process {self._owner}, this is its fork {os.getpid()}, which cannot talk "
                "to the workers; call parallelize after forking, or close() the copy here to run on one device"
            )

    def start(self, num_steps: int, signature: CallSignature) -> bool:
        """See `StepHandler.start`: covered are calls of the plan's signature with the weights that the ranks hold.

        Only whether these lie where they did is looked at here, since recorded graphs read that memory. Whether they
        are the denoiser's still, and were not written to, is looked at when the first step is under way: with thousands
        of parameters that takes as long as several layers.
        """
        if self._bypass:
            return False
        self._check_owner()
        if self.plan is not self._next_plan:
            self.plan = self._next_plan
            self._schedule = ScheduleState(self.plan.schedule)
        if torch.is_autocast_enabled(next(self._denoiser.parameters()).device.type):
            return self._uncovered("torch.autocast is on, which the plan's graphs do not follow (leave it out)")
        images = batch_factor(self.plan.model.signature, signature)
        if images is None:
            mismatch = self.plan.model.signature.mismatch(signature)
            return self._uncovered(f"the plan does not cover this call ({mismatch})")
        if self._weights.have_moved():
            return self._uncovered(_CHANGED)
        if images != self._images and not self._resize(images):
            return False
        if num_steps != self.plan.num_steps:
            self._say_once(
                f"the plan was made for {self.plan.num_steps} steps, got {num_steps}; every step runs its exact "
                f"pattern {self.plan.exact!r}"
            )
        self._generation += 1
        self._unchecked = True
        self.executed.clear()
        self._schedule.reset()
        self._estimates.reset()
        for missed in self._missed.values():
            missed.clear()
        try:
            self._executor.reset()
        except BaseException as error:
            self._fail(error, "the start of a generation")
        return True

    @property
    def is_bypassed(self) -> bool:
        """Whether the pipeline runs as if there were no plan."""
        return self._bypass

    def decode(self, rank: DecodeRank, latents: Tensor) -> Tensor:
        """The image of `latents` from all ranks, of which `rank` is this one's part.

        Raises:
            WorkerError: see `step`.
        """
        try:
            if self._watch is not None:
                self._watch.check()
            for worker in range(1, rank.ranks):
                assert self._outbox is not None
                self._outbox.send(worker, Order(self._generation, DECODING, None, None), ())
            image = rank.decode(latents, self._transport)
            if self._watch is not None:
                self._watch.mark()
                self._watch.finish()  # the image of a worker that failed must not be looked at
        except BaseException as error:
            self._fail(error, "the decoding of an image")
        return image

    def settle(self) -> None:
        """Wait until the steps so far have been computed, where a failing worker is noticed.

        Raises:
            WorkerError: see `step`.
        """
        if self._watch is not None:
            self._look_after(self._watch.drain, f"step {self._step}")

    def _resize(self, images: int) -> bool:
        """Have all ranks go on with so many images per call; False: the denoiser does not allow it."""
        if images not in self._executors:
            self._say_once(
                f"building graphs for {images} images at a time; parallelize(..., batch_sizes=[1, {images}]) has them "
                "ready from the start"
            )
        try:
            executor = self._executors.at(images)
        except PlanMismatchError as error:
            return self._uncovered(str(error))
        self._resizes += 1
        try:
            self._executor.reset()
            if self._outbox is not None:
                self._outbox.resize(
                    self._resizes, images, scale_signature(self.plan.model.signature, 1, images)
                )
            executor.prepare()
            if self._pool is not None:
                self._pool.wait_for(f"{RESIZED}-{self._resizes}", timeout_s=_BUILD_TIMEOUT_S)
        except BaseException as error:
            self._fail(error, f"the preparation for {images} images at a time")
        self._executor, self._images = executor, images
        return True

    @torch.no_grad()
    def step(self, call: GuidedCall) -> Mapping[Branch, Tensor] | None:
        """See `StepHandler.step`: the first step of a generation is given up if the weights are not what they were.

        Raises:
            WorkerError: a worker failed or hung; the plan has been closed and the pipeline runs on one device again.
        """
        self._step = call.step
        covered = call.num_steps == self.plan.num_steps
        name = self._schedule.pattern_at(call.step) if covered else self.plan.exact
        pattern = self.plan.pattern(name)
        self.executed.append(name)
        computed: dict[Branch, Tensor] = {}
        if pattern.units:
            try:
                computed = self._run(name, call)
            except BaseException as error:
                self._fail(error, f"step {call.step} ({name})")
        if self._unchecked:
            self._unchecked = False
            if self._weights.have_changed():
                self.executed.clear()
                self._uncovered(_CHANGED)
                return None
        if call.step == call.num_steps - 1:
            self.finish()
        pair = self._estimates.pair(pattern, computed, call.step)
        if covered and pattern.is_exact:
            self._schedule.observe(call.step, pair)
        return pair

    def finish(self) -> None:
        """Have the device do what was queued, as what follows is none of the plan's: a worker that failed must not go
        unnoticed.

        Raises:
            WorkerError: see `step`.
        """
        if self._watch is not None:
            self._look_after(self._watch.finish, "the last steps of a generation")

    def _look_after(self, wait: Callable[[], None], doing: str) -> None:
        try:
            wait()
        except BaseException as error:
            self._fail(error, doing)

    def is_exact_at(self, step: int, num_steps: int) -> bool:
        """Whether `step` of the present generation, of `num_steps`, is exact; asked when it begins."""
        return num_steps != self.plan.num_steps or self.plan.pattern(self._schedule.pattern_at(step)).is_exact

    def _run(self, name: str, call: GuidedCall) -> dict[Branch, Tensor]:
        following = self._following(call.step, call.num_steps)
        executor = self._executor
        if self._watch is not None:
            self._watch.admit()
        self._order(name, following, call)
        early = self._transport is None or self._transport.posts_early
        expected = executor.expect_estimates(name) if early else []
        computed = executor.run(name, following, call.inputs, self._moment(call))
        if not early:
            expected = executor.expect_estimates(name)
        for branches, incoming in expected:
            computed.update(zip(branches, incoming.wait()))
        if self._watch is not None:
            self._watch.mark()
        return computed

    def _order(self, name: str, following: str | None, call: GuidedCall) -> None:
        """Tell every rank that has a part in this step; the others hear of it with their next order."""
        if self._outbox is None:
            return
        moment = self._moment(call)
        self._outbox.note(call.inputs, None if moment is None else moment.timesteps)
        involved = self._executor.involved(name, following)
        flow = self._executor.flow(name)
        for rank, missed in self._missed.items():
            if rank not in involved:
                missed.append(self._index[name])
                if len(missed) == MAX_MISSED:
                    self._outbox.send(rank, Order(self._generation, call.step, None, None, tuple(missed)), ())
                    missed.clear()
                continue
            after = None if following is None else self._index[following]
            order = Order(
                self._generation, call.step, self._index[name], after, tuple(missed), has_timesteps=moment is not None
            )
            self._outbox.send(rank, order, flow.branches(rank))
            missed.clear()

    def _moment(self, call: GuidedCall) -> Moment | None:
        """Known to all ranks alike, if orders have room for so many timesteps."""
        return call.moment if self._outbox is None or call.num_steps <= self._outbox.steps else None

    def _following(self, step: int, num_steps: int) -> str | None:
        """The pattern of the next step that computes anything, if it is known before this step has run.

        Steps without units change no rank's state, so they do not count.
        """
        if num_steps != self.plan.num_steps:
            return self.plan.exact if step + 1 < num_steps else None
        settled = self._schedule.is_settled
        for later in range(step + 1, num_steps if settled else min(step + 2, num_steps)):
            if not self._schedule.next_is_known(later):
                return None
            name = self._schedule.pattern_at(later)
            if self.plan.pattern(name).units:
                return name
        return None

    def _fail(self, error: BaseException, doing: str) -> NoReturn:
        """Close and raise: after a step that broke off, the ranks no longer agree on what comes next."""
        reason = error
        if isinstance(error, PeerError) and self._pool is not None:
            error = error if self._watch is None else self._watch.explain(error)
            silent = error.silent
            assert self._transport is not None
            timeout_s = self._transport.timeout_s or 0.0
            reason = self._pool.failure(doing, silent=silent, timeout_s=timeout_s, suspect=error.peer)
        self._close()
        if reason is error:
            raise error
        raise reason from None

    def _uncovered(self, reason: str) -> bool:
        """Leave a generation to the denoiser as it comes.

        Raises:
            UsageError: no rank has the whole of it.
        """
        if self.plan.weights == "stages":
            raise UsageError(
                f"{reason}, and with weights='stages' no rank has the whole of the denoiser; call the pipeline as it "
                "was planned, or plan with weights='whole'"
            )
        self._say_once(f"{reason}; it runs on one device, exactly")
        return False

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"hybridiff: {message}", stacklevel=2)
