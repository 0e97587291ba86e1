"""How fast one machine runs a model: one GPU as it comes, one GPU compiled, and plans on several."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ..backends.hoisted_sizes import with_hoisted
from ..ir import (
    AdaptiveSchedule,
    CallSignature,
    FixedSchedule,
    InputError,
    LayerGraph,
    ModelInfo,
    Partition,
    Pattern,
    Plan,
    PlanMismatchError,
    Predictions,
    Profile,
    RankSpec,
    Schedule,
    UsageError,
)
from ..ir.versions import installed_versions
from ..planner.cost import CostModel
from ..planner.memory import predicted_peaks
from ..planner.partition import candidate_partitions
from ..planner.patterns import generate_patterns
from ..planner.policy import paper_schedule
from ..planner.reference import alternating_steps
from ..profiler.session import device_name
from ..report.results import BenchModel, BenchResults, BenchRow
from ..runtime.branch_calls import capture_branch
from ..runtime.decode_route import DecodeMode
from ..runtime.intercept import GuidedCall, find_denoiser, intercept
from ..runtime.memory import forget_peak, peak_bytes
from ..runtime.parallelize import ParallelPipeline
from .measure import loop_timed

__all__ = ["MANY_ROWS", "ROWS", "Bench", "bench_results", "default_rows", "predicted_seconds"]

ROWS = ("single-eager", "single-compiled", "branch", "paper", "planned-quarter", "planned-reuse")
"""What is measured on two ranks, in order; on more, these rows use two of them."""
MANY_ROWS = ("branch-pipe", "pipe", "planned-many")
"""Further rows for an even number of ranks above two: each branch through half of the ranks, both branches through
all of them, and the first with two of five steps on `reuse`; all between exact first and last steps."""
_CHEAP_SHARE = 0.4
_CHEAP = {"planned-quarter": ("branch-reuse:thin", "branch-reuse:nested"), "planned-reuse": ("reuse",)}
"""The pattern of the cheap steps: the first one that the model has a partition for."""

Progress = Callable[[str, int, int], None]


class _Recorder:
    """A step handler that notes the signature of one branch's call."""

    signature: CallSignature | None = None

    def start(self, num_steps: int, signature: CallSignature) -> bool:
        """Note it and let the pipeline run as it is."""
        self.signature = signature
        return False

    def step(self, call: GuidedCall) -> Mapping[Any, torch.Tensor]:
        """Never called."""
        raise AssertionError


class Bench:
    """One model at one size. `open` builds everything, `measure` yields the rows."""

    def __init__(
        self, pipe: Any, options: Mapping[str, Any], *, name: str, pixels: int, steps: int = 50, gpus: int = 2,
        rows: Sequence[str] = ROWS, repeats: int = 3, backend: str | None = None, threads: int | None = None,
        decode: DecodeMode = "pipeline", profile: Profile | None = None, traces: Path | None = None,
    ) -> None:
        """
        Args:
            pipe: the pipeline, its denoiser on the first rank's device.
            options: keyword arguments of its call but the number of steps.
            name: of the model.
            pixels: width and height, for the rows.
            steps: of a generation.
            gpus: ranks (1, 2 or an even number above; processes on a machine without GPUs).
            rows: which of `ROWS`, and of `MANY_ROWS` with more than two ranks.
            repeats: timed generations per row, after one that warms up.
            backend, threads: see `parallelize`.
            decode: see `parallelize`; for pipelines with a VAE, whose whole calls are timed too.
            profile: of the same denoiser; then its partitions are used instead of ones that balance arithmetic, and
                rows come with the latency that it predicts.
            traces: folder (made if missing) for a trace of one more generation of the row `branch`, on GPUs.

        Raises:
            UsageError: an unknown row, or one that needs more ranks.
        """
        known = (*ROWS, *MANY_ROWS)
        unknown = [row for row in rows if row not in known]
        if unknown or not rows:
            raise UsageError(f"unknown rows {unknown}; choose from {', '.join(known)}")
        if gpus < 2 and set(rows) - set(ROWS[:2]):
            raise UsageError(f"got {gpus} rank(s); rows other than {' and '.join(ROWS[:2])} are for 2 or more")
        if (gpus < 4 or gpus % 2) and set(rows) & set(MANY_ROWS):
            raise UsageError(f"got {gpus} rank(s); the rows {', '.join(MANY_ROWS)} are for 4, 6, 8, ...")
        self._pipe, self._options, self._name, self._pixels = pipe, options, name, pixels
        self._steps, self._gpus, self._repeats = steps, gpus, repeats
        self._rows = [row for row in known if row in rows]
        self._backend, self._threads, self._profile, self._traces = backend, threads, profile, traces
        self._has_vae = getattr(pipe, "vae", None) is not None
        self._decode: DecodeMode = decode if self._has_vae else "pipeline"
        self._denoiser = find_denoiser(pipe)[1]
        self._device = next(self._denoiser.parameters()).device

    @contextlib.contextmanager
    def open(
        self, on_progress: Progress = lambda stage, done, total: None
    ) -> Iterator[Callable[[], Iterator[BenchRow]]]:
        """Measure nothing yet: capture, start the workers, build the graphs. Yields the function that measures."""
        compiled = [row for row in self._rows if row != "single-eager"]
        if not compiled:
            yield lambda: self._measure(None, {}, on_progress)
            return
        on_progress("capture", 0, 1)
        plans = self._plans(compiled)
        forget_peak(self._device)
        with ParallelPipeline(
            self._pipe, next(iter(plans.values())), devices=None, timeout_s=120.0, threads=self._threads,
            backend=self._backend, decode=self._decode, on_progress=on_progress,
        ) as parallel:
            yield lambda: self._measure(parallel, plans, on_progress)

    def _measure(
        self, parallel: ParallelPipeline | None, plans: Mapping[str, Plan], on_progress: Progress
    ) -> Iterator[BenchRow]:
        eager: float | None = None
        strong: float | None = None
        built = 0.0 if parallel is None else self._peak_gib(parallel)
        for done, name in enumerate(self._rows):
            on_progress("rows", done, len(self._rows))
            before = _traffic(parallel)
            if name == "single-eager":
                forget_peak(self._device)
                with _bypassed(parallel):
                    eager = loop_s = self._loop_s()
                    peak, call_s = peak_bytes(self._device) / 2**30, self._call_s()
                forget_peak(self._device)
                patterns, ranks, decode = {"unmodified": self._steps}, 1, "pipeline"
            else:
                assert parallel is not None
                parallel.use(plans[name])
                loop_s = self._loop_s()
                patterns, ranks = dict(Counter(parallel.executed)), _ranks_used(plans[name])
                strong = loop_s if name == "single-compiled" else strong
                peak, decode = max(built, self._peak_gib(parallel)), parallel.decoded_by
            moved = (_traffic(parallel) - before) / ((self._repeats + 1) * self._steps)
            if name != "single-eager":
                call_s = None if ranks == 1 and decode == "rows" else self._call_s()  # then others take part in it
            stages = {} if parallel is None or name == "single-eager" else {
                pattern: max(parallel.stage_seconds(pattern)) for pattern in patterns
            }
            if self._traces is not None and parallel is not None and name == "branch":
                self._traces.mkdir(parents=True, exist_ok=True)
                with parallel.traced(self._traces / f"{self._name}-{name}.json.gz"):
                    self._pipe(num_inference_steps=self._steps, **self._options)
            ideal_s = sum(patterns[pattern] * seconds for pattern, seconds in stages.items())
            yield BenchRow(
                name=name, ranks=ranks, steps=self._steps, patterns=patterns, latency_s=loop_s, loop_s=loop_s,
                end_to_end_s=call_s, decode=None if call_s is None else decode,
                speedup=None if eager is None else eager / loop_s,
                speedup_vs_eager=None if eager is None else eager / loop_s,
                speedup_vs_strong=None if strong is None or name == "single-eager" else strong / loop_s,
                overhead_fraction=loop_s / ideal_s - 1 if ideal_s else None,
                stage_s=stages or None,
                predicted_s=None if name == "single-eager" or self._profile is None else predicted_seconds(
                    self._profile, patterns
                ),
                bytes_per_step=None if name == "single-eager" else round(moved), pixels=self._pixels,
                peak_gib=peak,
                predicted_peak_gib=None if name == "single-eager" else self._predicted_peak_gib(plans[name]),
            )
        on_progress("rows", len(self._rows), len(self._rows))

    def _peak_gib(self, parallel: ParallelPipeline) -> float:
        """Of the rank that needs most."""
        return max(parallel.peak_bytes()) / 2**30

    def _predicted_peak_gib(self, plan: Plan) -> float | None:
        """The same, as the plan predicts it, with the rest of the pipeline on rank 0."""
        peaks = plan.predictions.peak_bytes
        if self._device.type != "cuda" or not peaks:
            return None
        rest = sum(
            _tensor_bytes(module) for module in self._pipe.components.values()
            if isinstance(module, torch.nn.Module) and module is not self._denoiser
        )
        return max(peaks[0] + rest, *peaks) / 2**30

    def _loop_s(self) -> float:
        """Median of the denoising loop, without decoding anything."""
        loops = []
        for _ in range(self._repeats + 1):
            with loop_timed(self._pipe) as seconds:
                self._pipe(num_inference_steps=self._steps, **self._options)
            loops.append(seconds())
        return statistics.median(loops[1:])

    def _call_s(self) -> float | None:
        """Median of the whole call with the decode; None without a VAE."""
        if not self._has_vae:
            return None
        calls = []
        for _ in range(self._repeats + 1):
            _synchronize(self._device)
            begin = time.perf_counter()
            self._pipe(num_inference_steps=self._steps, **(dict(self._options) | {"output_type": "pt"}))
            _synchronize(self._device)
            calls.append(time.perf_counter() - begin)
        forget_peak(self._device)  # a decode as it comes takes several times what the loop does
        return statistics.median(calls[1:])

    def _plans(self, rows: Sequence[str]) -> dict[str, Plan]:
        """One plan per row, all over the same tables."""
        recorder = _Recorder()
        with intercept(self._pipe, recorder):
            self._pipe(num_inference_steps=1, **self._options)
        if recorder.signature is None:
            raise UsageError(
                f"{self._name}: no denoiser call with batched guidance was seen; set a guidance scale above 1"
            )
        layers = with_hoisted(capture_branch(self._denoiser, recorder.signature))
        if self._profile is None:
            partitions = candidate_partitions(
                layers, [layer.flops + 1.0 for layer in layers.layers], max(2, self._gpus)
            )
        else:
            if self._profile.model.fingerprint != layers.fingerprint():
                raise PlanMismatchError(
                    f"the profile is of another denoiser or size than {self._name} here; profile this one"
                )
            partitions = self._profile.partitions
        known = {pattern.name: pattern for pattern in generate_patterns(partitions, 2)}
        if self._gpus > 2:
            known |= {pattern.name: pattern for pattern in _pipes(partitions, self._gpus)}
        schedules = {row: self._schedule(row, known) for row in rows}
        used = {name for schedule in schedules.values() for name in schedule.patterns}
        exact = "single" if self._gpus == 1 or rows == ["single-compiled"] else "branch"
        patterns = tuple(pattern for name, pattern in known.items() if name in used | {exact})
        ranks = max(pattern.world_size for pattern in patterns)
        names = {pattern.partition for pattern in patterns}
        model = self._model(layers, recorder.signature)
        kept = tuple(p for p in partitions if p.name in names)
        peaks = predicted_peaks(
            layers, recorder.signature, patterns, kept, ranks=ranks, parameter_bytes=model.parameter_bytes,
            recorded=self._device.type == "cuda",
        )
        return {
            row: Plan(
                model=model, ranks=(RankSpec(device=cast(Any, self._device.type)),) * ranks, patterns=patterns,
                partitions=kept, exact=exact, schedule=schedule, predictions=Predictions(peak_bytes=peaks),
            )
            for row, schedule in schedules.items()
        }

    def _schedule(self, row: str, known: Mapping[str, Pattern]) -> Schedule:
        if row in _CHEAP:
            count = round(self._steps * _CHEAP_SHARE)
            cheap = next(name for name in _CHEAP[row] if name in known)
            return FixedSchedule(steps=alternating_steps(self._steps, count, "branch", cheap))
        if row in MANY_ROWS:
            wanted = "pipe" if row == "pipe" else "branch-pipe"
            pipe = next(name for name in (f"{wanted}:nested", f"{wanted}:linear") if name in known)
            count = round(self._steps * _CHEAP_SHARE) if row == "planned-many" else 0
            inner = alternating_steps(self._steps, count, pipe, "reuse")[1:-1]
            return FixedSchedule(steps=("branch", *inner, "branch"))
        if row == "paper":
            window = "paper:nested" if "paper:nested" in known else "paper:linear"
            rule: AdaptiveSchedule = paper_schedule(cast(Any, self), "branch", window)
            return rule
        return FixedSchedule(steps=(row.removesuffix("-compiled"),) * self._steps)

    @property
    def scheduler(self) -> str:
        """Class name of the pipeline's scheduler (with `num_steps` all that the paper's rule asks of a profile)."""
        return type(self._pipe.scheduler).__name__

    @property
    def num_steps(self) -> int:
        """Denoising steps of a generation."""
        return self._steps

    def _model(self, layers: LayerGraph, signature: CallSignature) -> ModelInfo:
        parameter = next(self._denoiser.parameters())
        return ModelInfo(
            name=self._name, denoiser=type(self._denoiser).__name__, fingerprint=layers.fingerprint(),
            parameter_bytes=sum(p.numel() * p.element_size() for p in self._denoiser.parameters()),
            dtype=str(parameter.dtype).removeprefix("torch."), signature=signature,
        )


def predicted_seconds(profile: Profile, patterns: Mapping[str, int]) -> float:
    """What a profile predicts for a denoising loop of these steps, by pattern name.

    Raises:
        InputError: its partitions have no such pattern, or costs for it were not measured.
    """
    known = {p.name: p for p in (*generate_patterns(profile.partitions, 2), *profile.patterns)}
    missing = [name for name in patterns if name not in known]
    if missing:
        raise InputError(f"the profile's partitions have no pattern {missing[0]!r}; it knows {', '.join(known)}")
    model = CostModel(profile)
    return sum(count * model.step(known[name]).latency_s for name, count in patterns.items())


def default_rows(gpus: int) -> tuple[str, ...]:
    """Every row that so many ranks can run."""
    return ROWS[:2] if gpus < 2 else ROWS if gpus < 4 or gpus % 2 else (*ROWS, *MANY_ROWS)


def bench_results(
    rows: Mapping[str, tuple[BenchRow, ...]], *, device: str, gpus: int, seed: int, random_weights: bool
) -> BenchResults:
    """The document of a run: rows by model, and what they were measured on."""
    return BenchResults(
        device=device_name(torch.device(device)), gpus=gpus, seed=seed, random_weights=random_weights,
        versions=installed_versions("torch", "diffusers", "hybridiff-compiler"),
        models={name: BenchModel(rows=measured) for name, measured in rows.items()},
    )


def _pipes(partitions: Sequence[Partition], gpus: int) -> Iterator[Pattern]:
    """`branch-pipe` (each branch through half of the ranks) and `pipe` (both through all) on every kind of split."""
    for partition in partitions:
        kind, stages = partition.name.rstrip("0123456789"), len(partition.stages)
        for name, wanted, shift in (("branch-pipe", gpus // 2, gpus // 2), ("pipe", gpus, 0)):
            if stages == wanted and kind != "thin":
                units = " ".join(
                    f"{branch}{stage}@{stage + (shift if branch == 'c' else 0)}"
                    f"({','.join(f'{branch}{other}~' for other in range(stages) if other != stage)})"
                    for branch in "uc" for stage in range(stages)
                )
                yield Pattern.parse(f"{name}:{kind}", f"{units} | cfg", partition=partition.name, stages=stages)


def _tensor_bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ranks_used(plan: Plan) -> int:
    return max(plan.pattern(name).world_size for name in plan.schedule.patterns)


def _traffic(parallel: ParallelPipeline | None) -> int:
    """Bytes that rank 0 has sent and received so far."""
    if parallel is None or parallel.transport is None:
        return 0
    return sum(parallel.transport.sent_bytes.values()) + sum(parallel.transport.received_bytes.values())


@contextlib.contextmanager
def _bypassed(parallel: ParallelPipeline | None) -> Iterator[None]:
    if parallel is None:
        yield
        return
    with parallel.bypassed():
        yield
