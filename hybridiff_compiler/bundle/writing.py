"""Writing bundles: every graph of a plan is compiled into a temporary folder, which then gets its name at once."""

from __future__ import annotations

import operator
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from ..backends.artifact import ArtifactBackend, Job, artifact_backend
from ..backends.onnx_weights import OnnxWeights
from ..backends.stage_io import (
    ESTIMATE,
    stage_digest,
    stage_inputs,
    stage_outputs,
    stage_weights,
    tensor_spec,
    weights_digest,
)
from ..backends.target import Target
from ..capture import CapturedDenoiser, StageGraph
from ..ir import WHOLE, InputError, Partition, Plan, lower
from ..runtime.executor import capture_for
from ..runtime.segments import SegmentRunner
from .builders import BuildOrder, build_in_processes, default_jobs
from .files import record_file
from .graphs import CONSTANTS_FILE, Constant, GraphRecord, Graphs
from .identity import ModelIdentity
from .manifest import GRAPHS_FILE, MANIFEST_FILE, PLAN_FILE, Artifact, Manifest, segment_name
from .reading import Bundle

__all__ = ["StageBuild", "check_destination", "distinct_stages", "write_bundle"]

Progress = Callable[[str, int, int], None]


@dataclass
class StageBuild:
    """One stage graph of a plan and where the plan runs it."""

    stage: StageGraph
    digest: str
    branches: int
    segments: set[str] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)


def write_bundle(
    plan: Plan, denoiser: nn.Module, folder: str | os.PathLike[str], *, backend: str, arch: str | None = None,
    jobs: int | None = 1, on_progress: Progress = lambda stage, done, total: None,
) -> Bundle:
    """Compile all graphs of `plan` and write them with it; the folder appears when it is complete.

    Args:
        plan: every pattern in it is compiled, not only those that its schedule names.
        denoiser: the network with its weights.
        folder: is made; a bundle that is there already is replaced.
        backend: one of `ARTIFACT_BACKENDS`.
        arch: GPU to build for, e.g. `sm_89`; default: this machine's.
        jobs: processes that compile; None: as many as there are graphs, cores and memory for. Backends that put weights
            into their artifacts use this process alone.
        on_progress: called with (stage, done, total).

    Raises:
        UsageError: the backend cannot build for these ranks or is not installed.
        InputError: a stage cannot be compiled, or the folder cannot be written.
        PlanMismatchError: the plan is for another denoiser.
    """
    builder = artifact_backend(backend)
    destination = check_destination(folder)
    target = builder.target(plan.ranks[0].device, plan.model.dtype, arch)
    missing = builder.missing()
    if missing is not None:
        raise InputError(f"backend {backend} {missing}; or choose another --backend")
    captured = capture_for(plan, denoiser)
    builds = distinct_stages(plan, denoiser, captured)
    work = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        files = _build(plan, denoiser, builder, target, work, builds, jobs, on_progress)
        artifacts = []
        for build, file in zip(builds, files, strict=True):
            artifacts.append(Artifact(
                **dict(record_file(file)), graph=build.digest, segments=tuple(sorted(build.segments)),
                ranks=tuple(sorted(build.ranks)), branches=2 if build.branches == 2 else 1,
                weights=None if builder.binds_weights else weights_digest(stage_weights(build.stage)),
                inputs=stage_inputs(build.stage), outputs=stage_outputs(build.stage),
            ))
        plan.save(work / PLAN_FILE)
        _save_graphs(work, captured, denoiser, builds)
        names = (*builder.shared, CONSTANTS_FILE)
        shared = tuple(record_file(work / name) for name in names if (work / name).exists())
        Manifest.sealed(
            backend=backend, fingerprint=plan.model.fingerprint, target=target, plan=record_file(work / PLAN_FILE),
            graphs=record_file(work / GRAPHS_FILE), artifacts=tuple(artifacts), shared=shared,
        ).save(work / MANIFEST_FILE)
        _publish(work, destination)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Bundle.open(destination)


def _build(
    plan: Plan, denoiser: nn.Module, backend: ArtifactBackend, target: Target, work: Path,
    builds: Sequence[StageBuild], jobs: int | None, on_progress: Progress,
) -> list[Path]:
    """The artifacts of `builds`, in their order."""
    def report(done: int) -> None:
        on_progress(f"compiling with {backend.name}", done, len(builds))

    orders = [BuildOrder(build.digest, f"stage{i:02d}-{build.digest[:12]}") for i, build in enumerate(builds)]
    report(0)
    if backend.binds_weights:
        jobs = default_jobs(len(builds), denoiser) if jobs is None else min(jobs, len(builds))
        if jobs > 1:
            return build_in_processes(
                plan, denoiser, backend.name, target, work, orders, jobs=jobs, on_built=report
            )
    files: list[Path] = []
    weights = OnnxWeights(work)
    for build, order in zip(builds, orders):
        job = Job(stage=build.stage, folder=work, name=order.name, target=target, weights=weights)
        files.append(backend.build(job))
        report(len(files))
    return files


def distinct_stages(
    plan: Plan, denoiser: nn.Module, captured: CapturedDenoiser | None = None
) -> list[StageBuild]:
    """Every stage graph that some rank of `plan` runs, each once.

    Args:
        plan: the tables.
        denoiser: the network.
        captured: from `capture_for(plan, denoiser)`, when the caller has it already.

    Raises:
        PlanMismatchError: the plan is for another denoiser.
    """
    runner = SegmentRunner(
        denoiser, plan.model.signature, plan.patterns, plan.partitions,
        captured=captured or capture_for(plan, denoiser),
    )
    partitions = {p.name: p for p in plan.partitions} | {WHOLE: Partition.whole(runner.layers)}
    builds: dict[str, StageBuild] = {}
    for segment in dict.fromkeys(s for pattern in plan.patterns for s in lower(pattern)):
        names = partitions[segment.partition].evaluated(segment.stages)
        taps = [name for branch, name in runner.values_written(segment) if branch == segment.branches[0]]
        stage = runner.captured(len(segment.branches)).extract(names, taps)
        digest = stage_digest(stage)
        build = builds.setdefault(digest, StageBuild(stage, digest, len(segment.branches)))
        build.segments.add(segment_name(segment))
        build.ranks.add(segment.rank)
    return list(builds.values())


def check_destination(folder: str | os.PathLike[str]) -> Path:
    """Refuse an output folder before the work starts.

    Raises:
        InputError: it holds something else than a bundle, or the folder around it cannot be written.
    """
    path = Path(os.path.abspath(folder))
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path}: is a file or a link; give the path of a folder to make")
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST_FILE).is_file():
        raise InputError(f"{path}: exists and is no bundle; choose another output folder or remove it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}; choose another output path") from None
    return path


def _save_graphs(
    work: Path, captured: CapturedDenoiser, denoiser: nn.Module, builds: Sequence[StageBuild]
) -> None:
    """Record what loading needs to know of the capture, and the constants that the denoiser does not hold."""
    weights = {name: tensor for build in builds for name, tensor in stage_weights(build.stage).items()}
    constants = {name: tensor for name, tensor in weights.items() if not _holds(denoiser, name)}
    value = captured.graph_module.graph.output_node().all_input_nodes[0].meta["val"]
    Graphs(
        identity=ModelIdentity.of(denoiser), layers=captured.layers, estimate=tensor_spec(ESTIMATE, value),
        graphs=tuple(
            GraphRecord(
                graph=build.digest, leaves=len(build.stage.inputs),
                weights=tuple(tensor_spec(name, tensor) for name, tensor in stage_weights(build.stage).items()),
            )
            for build in builds
        ),
        constants=tuple(
            Constant(name=name, follows=tensor.device.type != "cpu") for name, tensor in constants.items()
        ),
    ).save(work / GRAPHS_FILE)
    if constants:
        from safetensors.torch import save_file

        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in constants.items()},
                  work / CONSTANTS_FILE)


def _holds(denoiser: nn.Module, name: str) -> bool:
    try:
        return isinstance(operator.attrgetter(name)(denoiser), Tensor)
    except AttributeError:
        return False


def _publish(work: Path, destination: Path) -> None:
    """Give the finished folder its name; an older bundle stays complete until then."""
    umask = os.umask(0)
    os.umask(umask)
    work.chmod(0o777 & ~umask)
    if not destination.exists():
        work.rename(destination)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old.", dir=destination.parent))
    try:
        old = destination.rename(aside / "bundle")
        try:
            work.rename(destination)
        except BaseException:
            with suppress(OSError):
                old.rename(destination)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
