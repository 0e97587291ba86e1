"""The single-device simulator: interprets a plan's tables in one process.

It is the reference for the distributed runtime (which must return the same tensors) and the profiler's instrument: the
image a plan produces depends on its tables alone, not on how many devices run them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..backends.cuda_graph import Recorder, recorder_for
from ..backends.kept import Moment
from ..ir import Branch, CallSignature, Pattern, Plan, PlanMismatchError, lower
from .branch_calls import batch_factor, scale_signature
from .estimates import EstimateMemory
from .intercept import GuidedCall
from .schedule_state import ScheduleState
from .segments import SegmentRunner, Slot

__all__ = ["Simulator", "run_pattern"]


def run_pattern(
    runner: SegmentRunner,
    pattern: Pattern,
    inputs: Mapping[Branch, Mapping[str, Tensor]],
    values: Mapping[Slot, Tensor],
    *,
    moment: Moment | None = None,
) -> tuple[dict[Branch, Tensor], dict[Slot, Tensor]]:
    """Evaluate every segment of `pattern` once.

    Stale reads see `values` (what earlier steps left), fresh reads see what this step computed. `moment`: which step
    this is, if the timesteps of all are known.

    Returns:
        The computed estimates by branch, and the values this step computed.
    """
    computed: dict[Branch, Tensor] = {}
    written: dict[Slot, Tensor] = {}
    for segment in lower(pattern):
        taken = {r.source: (values if r.stale else written)[r.source] for r in runner.values_read(segment)}
        estimates, new = runner.run(segment, inputs, taken, moment=moment)
        computed.update(estimates)
        written.update(new)
    return computed, written


class Simulator:
    """A `StepHandler` that runs a plan's schedule on the denoiser's own device.

    Images per branch may be any number (prompts can be simulated together); an adaptive schedule then follows the
    discrepancy of the whole batch.
    """

    def __init__(
        self,
        plan: Plan,
        denoiser: nn.Module,
        *,
        backend: str = "eager",
        runners: dict[int, SegmentRunner] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """
        Args:
            plan: the tables.
            denoiser: the network.
            backend: see `hybridiff_compiler.backends`.
            runners: by images per branch, runners over at least the plan's patterns; missing ones are added.
            recorder: see `SegmentRunner`; default: CUDA graphs on CUDA, as the ranks have them.
        """
        self.plan = plan
        self._denoiser, self._backend = denoiser, backend
        self._recorder = recorder or recorder_for(next(denoiser.parameters()).device)
        self._runners = {} if runners is None else runners
        self._runner: SegmentRunner | None = None
        self._state = ScheduleState(plan.schedule)
        self._estimates = EstimateMemory()
        self._values: dict[Slot, Tensor] = {}
        self.executed: list[str] = []
        """Pattern names of the current generation so far."""

    def start(self, num_steps: int, signature: CallSignature) -> bool:
        """See `StepHandler.start`; every batch size of the plan's signature is covered."""
        expected = self.plan.model.signature
        factor = batch_factor(expected, signature)
        if factor is None:
            return False
        self._runner = self._runner_at(factor)
        self._runner.forget()
        self._state.reset()
        self._estimates.reset()
        self._values.clear()
        self.executed.clear()
        return True

    @torch.no_grad()
    def step(self, call: GuidedCall) -> Mapping[Branch, Tensor]:
        """See `StepHandler.step`."""
        assert self._runner is not None, "intercept calls start before step"
        covered = call.num_steps == self.plan.num_steps
        pattern = self.plan.pattern(self._state.pattern_at(call.step) if covered else self.plan.exact)
        self.executed.append(pattern.name)
        computed, written = run_pattern(self._runner, pattern, call.inputs, self._values, moment=call.moment)
        self._values.update(written)
        pair = self._estimates.pair(pattern, computed, call.step)
        if covered and pattern.is_exact:
            self._state.observe(call.step, pair)
        return pair

    def _runner_at(self, factor: int) -> SegmentRunner:
        if factor not in self._runners:
            signature = scale_signature(self.plan.model.signature, 1, factor)
            runner = SegmentRunner(
                self._denoiser, signature, self.plan.patterns, self.plan.partitions, batch=factor,
                backend=self._backend, recorder=self._recorder,
            )
            if factor == 1 and runner.layers.fingerprint() != self.plan.model.fingerprint:
                raise PlanMismatchError(
                    f"the plan was made for {self.plan.model.name} (graph {self.plan.model.fingerprint[:12]}), this "
                    f"denoiser's graph is {runner.layers.fingerprint()[:12]}; profile this model and plan again"
                )
            self._runners[factor] = runner
        return self._runners[factor]
