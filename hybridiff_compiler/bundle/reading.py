"""Opening bundles: everything is checked before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..backends.artifact import Executable, artifact_backend
from ..backends.stage_io import stage_digest, stage_inputs, stage_outputs, weights_digest
from ..capture import StageGraph
from ..ir import InputError, Plan, PlanMismatchError, UsageError
from .files import check_file, read_text
from .manifest import MANIFEST_FILE, Manifest

__all__ = ["SCHEME", "Bundle", "load_executable", "resolve_plan"]

SCHEME = "bundle:"
"""Start of the backend names that mean a bundle: `bundle:<seal>:<folder>`."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are what its manifest says."""

    folder: Path
    manifest: Manifest
    plan: Plan

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Bundle:
        """Read a bundle and check every file in it; nothing is loaded or executed.

        Raises:
            InputError: it is no bundle, or damaged.
        """
        root = Path(folder).resolve()
        manifest = _read_manifest(root)
        for record in manifest.files:
            check_file(root, record)
        source = root / manifest.plan.file
        plan = Plan.parse(read_text(source), source=str(source))
        if plan.model.fingerprint != manifest.fingerprint:
            raise InputError(f"{root}: plan and artifacts are for different denoisers; compile the bundle again")
        return cls(root, manifest, plan)

    def check_machine(self) -> None:
        """Refuse a bundle that was compiled for another machine or with other versions.

        Raises:
            PlanMismatchError: says what differs and what to do.
        """
        _check_machine(self.manifest)

    @property
    def backend(self) -> str:
        """A name for `compile_stage` that takes every executable from this bundle; it may be sent to other ranks."""
        return f"{SCHEME}{self.manifest.seal}:{self.folder}"


def resolve_plan(
    source: Plan | Bundle | str | os.PathLike[str], backend: str | None = None
) -> tuple[Plan, str | None]:
    """The plan that `source` is or holds, and the backend to run it with.

    Args:
        source: a plan, an opened bundle, the folder of a bundle, or the file of a plan.
        backend: the backend asked for; None where it was not said.

    Raises:
        UsageError: a backend was asked for, but the source is a bundle.
        InputError: the file or bundle is damaged, or is for another machine.
    """
    if isinstance(source, Plan):
        return source, backend
    if not isinstance(source, Bundle) and Path(source).is_file():
        return Plan.load(source), backend
    bundle = source if isinstance(source, Bundle) else Bundle.open(source)
    if backend is not None:
        raise UsageError(
            f"got backend={backend!r} for a bundle, which is compiled with {bundle.manifest.backend} already; leave "
            "the backend out, or give the plan instead"
        )
    bundle.check_machine()
    return bundle.plan, bundle.backend


def load_executable(stage: StageGraph, backend: str) -> Executable:
    """The executable for `stage` out of the bundle that `backend` (from `Bundle.backend`) names.

    Raises:
        InputError: the bundle changed meanwhile, or is damaged.
        PlanMismatchError: it was made for another graph, other weights, another machine or other versions.
    """
    seal, _, folder = backend.removeprefix(SCHEME).partition(":")
    root = Path(folder)
    manifest = _sealed_manifest(root, seal)
    digest = stage_digest(stage)
    artifact = manifest.artifact_for(digest)
    if artifact is None:
        takes = ", ".join((*stage.inputs, *stage.values_in)[:4])
        raise PlanMismatchError(
            f"{root}: no artifact for the stage graph {digest[:12]} (inputs {takes}, ...); the bundle holds "
            f"{len(manifest.artifacts)} for other graphs; compile it again for this denoiser and plan"
        )
    if (artifact.inputs, artifact.outputs) != (stage_inputs(stage), stage_outputs(stage)):
        raise PlanMismatchError(f"{root}: {artifact.file} has other inputs and outputs than the plan; compile it again")
    if artifact.weights is not None and artifact.weights != weights_digest(stage):
        raise PlanMismatchError(
            f"{root}: {artifact.file} was built with other weights than this denoiser's, which are part of "
            f"{manifest.backend} artifacts; compile the bundle again, or use --backend aotinductor, which reads the "
            "live weights"
        )
    for record in manifest.shared:
        _check_once(root, record.file, seal)
    return artifact_backend(manifest.backend).load(check_file(root, artifact), stage)


def _read_manifest(root: Path) -> Manifest:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give a bundle that `hybridiff compile` wrote")
    if not (root / MANIFEST_FILE).exists():
        raise InputError(f"{root}: holds no {MANIFEST_FILE}, so it is no bundle; make one with `hybridiff compile`")
    source = root / MANIFEST_FILE
    manifest = Manifest.parse(read_text(source), source=str(source))
    try:
        manifest.check_seal()
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return manifest


@lru_cache(maxsize=8)
def _sealed_manifest(root: Path, seal: str) -> Manifest:
    manifest = _read_manifest(root)
    if manifest.seal != seal:
        raise InputError(f"{root}: the bundle was replaced after it was opened; open it again")
    _check_machine(manifest)
    return manifest


@lru_cache(maxsize=32)
def _check_once(root: Path, name: str, seal: str) -> None:
    """Check a shared file, which may be large, once per process."""
    check_file(root, next(record for record in _sealed_manifest(root, seal).shared if record.file == name))


def _check_machine(manifest: Manifest) -> None:
    backend = artifact_backend(manifest.backend)
    missing = backend.missing()
    if missing is not None and backend.name != "aotinductor":  # a compiler is needed to build, not to load
        raise PlanMismatchError(f"the bundle's backend {backend.name} {missing}")
    manifest.target.check(backend.versions())
