"""Opening bundles: everything is checked before anything is loaded (by `loading.py`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..backends.artifact import artifact_backend
from ..ir import InputError, Plan, PlanMismatchError, UsageError, lower
from .files import check_file, read_text
from .graphs import Graphs
from .manifest import MANIFEST_FILE, Manifest, segment_name

__all__ = ["SCHEME", "Bundle", "check_once", "named_bundle", "resolve_plan"]

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
        _check_graphs(root, manifest, plan)
        return cls(root, manifest, plan)

    def check_machine(self) -> None:
        """Refuse a bundle that was compiled for another machine or with other versions.

        Raises:
            PlanMismatchError: says what differs and what to do.
        """
        _check_machine(self.manifest)

    @property
    def backend(self) -> str:
        """A name of this bundle in place of a backend's; it may be sent to other ranks on this machine."""
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


def named_bundle(backend: str) -> tuple[Path, Manifest]:
    """Folder and manifest of the bundle that `backend` (from `Bundle.backend`) names.

    Raises:
        InputError: the bundle was replaced since it was opened, or its manifest is damaged.
        PlanMismatchError: it was made for another machine or other versions.
    """
    seal, _, folder = backend.removeprefix(SCHEME).partition(":")
    root = Path(folder)
    return root, _sealed_manifest(root, seal)


def _read_manifest(root: Path) -> Manifest:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give a bundle that `hybridiff compile` wrote")
    if not (root / MANIFEST_FILE).exists():
        raise InputError(f"{root}: holds no {MANIFEST_FILE}, so it is no bundle; make one with `hybridiff compile`")
    source = root / MANIFEST_FILE
    try:
        manifest = Manifest.parse(read_text(source), source=str(source))
    except InputError as error:
        remedy = "damaged, or of another version of hybridiff: run `hybridiff compile` again"
        raise InputError(f"{error}; it is {remedy}") from None
    try:
        manifest.check_seal()
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return manifest


def _check_graphs(root: Path, manifest: Manifest, plan: Plan) -> None:
    """Artifacts, plan and what is recorded of the captured denoiser must be about the same graphs."""
    source = root / manifest.graphs.file
    graphs = Graphs.parse(read_text(source), source=str(source))
    if graphs.layers.fingerprint() != plan.model.fingerprint:
        raise InputError(f"{source}: is of another denoiser than the plan; compile the bundle again")
    if {record.graph for record in graphs.graphs} != {artifact.graph for artifact in manifest.artifacts}:
        raise InputError(f"{source}: is about other graphs than the artifacts; compile the bundle again")
    for artifact in manifest.artifacts:
        record = graphs.record(artifact.graph)
        if record is not None and record.leaves > len(artifact.inputs):
            raise InputError(f"{source}: {artifact.file} has fewer inputs than recorded; compile the bundle again")
    launches = {segment_name(segment) for pattern in plan.patterns for segment in lower(pattern)}
    missing = sorted(launches - {name for artifact in manifest.artifacts for name in artifact.segments})
    if missing:
        raise InputError(f"{root}: no artifact for the plan's {', '.join(missing[:3])}; compile the bundle again")


@lru_cache(maxsize=8)
def _sealed_manifest(root: Path, seal: str) -> Manifest:
    manifest = _read_manifest(root)
    if manifest.seal != seal:
        raise InputError(f"{root}: the bundle was replaced after it was opened; open it again")
    _check_machine(manifest)
    return manifest


@lru_cache(maxsize=32)
def check_once(root: Path, name: str, seal: str) -> None:
    """Check a shared file, which may be large, once per process."""
    check_file(root, next(record for record in _sealed_manifest(root, seal).shared if record.file == name))


def _check_machine(manifest: Manifest) -> None:
    backend = artifact_backend(manifest.backend)
    # What aotinductor may lack is a compiler, which is needed to build, not to load; looking for one takes time.
    missing = None if backend.name == "aotinductor" else backend.missing()
    if missing is not None:
        raise PlanMismatchError(f"the bundle's backend {backend.name} {missing}")
    manifest.target.check(backend.versions())
