"""A profile prepared for planning: the candidate patterns with their step costs and errors, and what they predict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from ..ir import InputError, Pattern, Predictions, Profile, RankSpec, UsageError
from .cost import CostModel, StepCost
from .patterns import FAMILIES, exact_patterns, family_of
from .placement import fastest_placement
from .robust import quantile_offset_db, quantile_reserve_db
from .stage_only import WEIGHTS, on_own_stages, relay_pattern, stage_partition
from .tables import StepTable, schedule_errors, step_tables
from .work import in_work_units
from .worlds import check_gpus

__all__ = ["Problem"]


class Problem:
    """Everything that one profile says about running on `gpus` ranks."""

    def __init__(
        self, profile: Profile, gpus: int, without: Iterable[str] = (), extra: Sequence[Pattern] = (),
        ranks: Sequence[RankSpec] | None = None, weights: str = "whole",
        omit: Iterable[str] = (),
    ) -> None:
        """
        Args:
            profile: measurements; its patterns are the candidates, on whichever ranks they are fastest.
            gpus: ranks, 1 or more.
            without: families to leave out.
            extra: further candidates, `without` or not.
            ranks: the ranks where they differ in speed; default: all as profiled.
            omit: names of patterns to leave out; not all of the exact ones.
            weights: `stages`: only patterns in which every rank evaluates one and the same stage (`stage_only`).

        Raises:
            UsageError: `gpus` is out of range or not the number of ranks, or `without` names an unknown family.
            InputError: `stages`, and the profile has no partition for it.
        """
        check_gpus(gpus)
        if ranks is not None and len(ranks) != gpus:
            raise UsageError(f"got {len(ranks)} ranks for {gpus} GPUs; describe every rank once")
        if weights not in WEIGHTS:
            raise UsageError(f"got weights={weights!r}; choose from {', '.join(WEIGHTS)}")
        if weights == "stages" and gpus < 2:
            raise UsageError("weights='stages' divides a model among 2 ranks or more, got 1")
        self.profile, self.gpus, self.weights = profile, gpus, weights
        self._model = CostModel(profile, ranks)
        speeds = None if ranks is None else [rank.speed for rank in ranks]
        single, *divided = exact_patterns(gpus)
        exact = [single, *(fastest_placement(pattern, gpus, self._model, speeds) for pattern in divided)]
        cheap = [fastest_placement(p, gpus, self._model, speeds) for p in profile.patterns if not p.is_exact]
        if weights == "stages":
            partition = stage_partition(profile, gpus)
            exact = [single, relay_pattern(partition)]
            cheap = list(on_own_stages(profile.patterns, partition))
        self.excluded = _check_families(without, cheap)
        offered = exact if weights == "whole" else exact[1:]
        left_out = frozenset(omit)
        chosen = [*offered, *(p for p in cheap if family_of(p.name) not in self.excluded)]
        chosen = [*(p for p in chosen if p.name not in left_out), *extra]
        self.patterns: tuple[Pattern, ...] = tuple({pattern.name: pattern for pattern in chosen}.values())
        self.exact = exact[-1]
        """`branch`, or `single` on one rank, or the relay."""
        self.single = exact[0]

    @cached_property
    def by_name(self) -> dict[str, Pattern]:
        """The candidate patterns by name."""
        return {pattern.name: pattern for pattern in self.patterns}

    def exact_of(self, steps: Sequence[str]) -> str:
        """The exact pattern for calls that a schedule does not cover: its own one, so that ranks need no other."""
        return next((name for name in steps if self.by_name[name].is_exact), self.exact.name)

    @cached_property
    def costs(self) -> dict[str, StepCost]:
        """Step costs of the candidates by name.

        Raises:
            InputError: the denoiser takes no time.
        """
        found = {pattern.name: self._model.step(pattern) for pattern in (self.single, *self.patterns)}
        if not found[self.single.name].ideal_s > 0:
            raise InputError(
                "the profile says that the denoiser takes no time, so there is nothing to plan with; profile the model "
                "again"
            )
        return found

    @cached_property
    def tables(self) -> tuple[StepTable, ...]:
        """The candidates that can be planned with: exact or of measured error."""
        latencies = {name: cost.latency_s for name, cost in self.costs.items()}
        return step_tables(self.patterns, latencies, self.profile.errors_by_pattern)

    @property
    def single_s(self) -> float:
        """Predicted denoising loop of one rank, both branches batched: the baseline of every speed-up."""
        return self.profile.num_steps * self.costs[self.single.name].latency_s

    def psnr_db(self, error: float) -> float:
        """Predicted mean PSNR of a schedule whose step errors sum to `error`; infinite for exact ones."""
        return self.profile.compounding.psnr_db(error)

    def judged_db(self, error: float, quantile: float | None = None) -> float:
        """What a quality target is compared with: `psnr_db`, or that quantile of the PSNR over prompts."""
        psnr = self.psnr_db(error)
        return psnr if math.isinf(psnr) else psnr + self.quantile_offset_db(quantile, psnr)

    def quantile_offset_db(self, quantile: float | None, mean_db: float) -> float:
        """How far a quantile of the PSNR over prompts lies from the mean; see `robust`."""
        return 0.0 if quantile is None else quantile_offset_db(self.profile.compounding, quantile, mean_db)

    def reserve_db(self, quantile: float | None = None) -> float:
        """What is kept in reserve for the error of the prediction; see `Compounding.reserve_db` and `robust`."""
        compounding = self.profile.compounding
        return compounding.reserve_db if quantile is None else quantile_reserve_db(compounding, quantile)

    def latency_s(self, steps: Sequence[str]) -> float:
        """Predicted denoising loop of a schedule."""
        return math.fsum(self.costs[name].latency_s for name in steps)

    def ideal_s(self, steps: Sequence[str]) -> float:
        """Measured stage times of a schedule alone."""
        return math.fsum(self.costs[name].ideal_s for name in steps)

    def ideal_speedup(self, steps: Sequence[str]) -> float:
        """Stage times of the one-rank run over those of a schedule."""
        return len(steps) * self.costs[self.single.name].ideal_s / self.ideal_s(steps)

    def error(self, steps: Sequence[str]) -> float | None:
        """Summed step errors of a schedule; None where the profile measured no error for one of them."""
        index = {table.pattern.name: number for number, table in enumerate(self.tables)}
        if any(name not in index for name in steps):
            return None
        error = float(schedule_errors(self.tables, np.array([[index[name] for name in steps]], dtype=np.int16))[0])
        return error if math.isfinite(error) else None

    @cached_property
    def work(self) -> dict[str, float]:
        """Denoiser evaluations on the critical path of one step, by pattern name; see `work`."""
        units = CostModel(in_work_units(self.profile))
        return {pattern.name: units.step(pattern).ideal_s for pattern in (self.single, *self.patterns)}

    def work_speedup(self, steps: Sequence[str]) -> float | None:
        """Evaluations of the one-rank run over those of a schedule; None when that has none."""
        spent = math.fsum(self.work[name] for name in steps)
        return len(steps) * self.work[self.single.name] / spent if spent > 0 else None

    def predict(self, steps: Sequence[str], target: str = "", quantile: float | None = None) -> Predictions:
        """Predictions for a fixed schedule; with `quantile` also for that quantile over prompts.

        Raises:
            InputError: a step names a pattern that is no candidate.
        """
        unknown = sorted(set(steps) - set(self.by_name))
        if unknown:
            raise InputError(f"the profile knows no pattern {unknown[0]!r}; it has {', '.join(self.by_name)}")
        latency, error = self.latency_s(steps), self.error(steps)
        psnr = None if error is None or math.isinf(self.psnr_db(error)) else self.psnr_db(error)
        return Predictions(
            latency_s=latency, single_s=self.single_s, speedup=self.single_s / latency,
            ideal_speedup=self.ideal_speedup(steps), work_speedup=self.work_speedup(steps), psnr_db=psnr,
            quantile=quantile,
            psnr_quantile_db=(
                None if psnr is None or quantile is None else psnr + self.quantile_offset_db(quantile, psnr)
            ),
            target=target,
        )


def _check_families(without: Iterable[str], cheap: Sequence[Pattern]) -> frozenset[str]:
    excluded = frozenset((without,) if isinstance(without, str) else without)
    allowed = dict.fromkeys([f.name for f in FAMILIES if not f.exact] + [family_of(p.name) for p in cheap])
    unknown = sorted(excluded - set(allowed))
    if unknown:
        raise UsageError(
            f"got without {unknown[0]!r}, which is no family of cheap patterns; choose from {', '.join(allowed)}"
        )
    return excluded
