"""The manifest of a bundle: every file with its hash, and what each artifact computes and for which machine."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ..backends.artifact import ARTIFACT_BACKENDS
from ..backends.stage_io import TensorSpec
from ..backends.target import Target
from ..ir import Data, Document, InputError, Segment

__all__ = ["GRAPHS_FILE", "MANIFEST_FILE", "PLAN_FILE", "Artifact", "FileRecord", "Manifest", "Sha256", "segment_name"]

MANIFEST_FILE = "manifest.json"
PLAN_FILE = "plan.json"
GRAPHS_FILE = "graphs.json"

FileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,120}$")]
"""Of a file in the bundle's folder itself: no separators, so no path leads out."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileRecord(Data):
    """One file of the bundle."""

    file: FileName
    sha256: Sha256
    size: int = Field(ge=0)
    """Bytes."""


class Artifact(FileRecord):
    """One compiled stage graph."""

    graph: Sha256
    """Digest of the graph (`stage_digest`)."""
    segments: tuple[str, ...] = Field(min_length=1)
    """Where the plan runs it: `segment_name` of every launch."""
    ranks: tuple[int, ...]
    """Ranks that load it."""
    branches: Literal[1, 2]
    """Branches batched."""
    weights: Sha256 | None
    """Digest of the weights that are inside; None when it reads the live parameters."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Manifest(Document):
    """What a bundle holds."""

    kind: Literal["bundle"] = "bundle"
    schema_version: Literal[3] = 3
    backend: str
    fingerprint: Sha256
    """Of the denoiser's layer graph; the plan's."""
    target: Target
    plan: FileRecord
    graphs: FileRecord
    """The captured denoiser without its operations (`Graphs`)."""
    artifacts: tuple[Artifact, ...] = Field(min_length=1)
    shared: tuple[FileRecord, ...] = ()
    """Files that artifacts refer to, such as weights."""
    seal: str = ""
    """`digest()` of the manifest without it: a flipped bit in here is noticed, too."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [record.file for record in self.files]
        if len(set(names)) != len(names) or MANIFEST_FILE in names:
            raise ValueError("the same file is listed twice")
        if (self.plan.file, self.graphs.file) != (PLAN_FILE, GRAPHS_FILE):
            raise ValueError(f"got {self.plan.file} and {self.graphs.file} for {PLAN_FILE} and {GRAPHS_FILE}")
        graphs = [artifact.graph for artifact in self.artifacts]
        if len(set(graphs)) != len(graphs):
            raise ValueError("two artifacts are for the same graph")
        launches = [name for artifact in self.artifacts for name in artifact.segments]
        if len(set(launches)) != len(launches):
            raise ValueError("two artifacts are for the same launch of the plan")
        if self.backend not in ARTIFACT_BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}; known are {', '.join(ARTIFACT_BACKENDS)}")
        return self

    @classmethod
    def sealed(cls, **fields: Any) -> Manifest:
        """A manifest with its seal."""
        manifest = cls(**fields)
        return manifest.model_copy(update={"seal": manifest.digest()})

    def check_seal(self) -> None:
        """Refuse a manifest that was changed after it was written.

        Raises:
            InputError: the seal does not match.
        """
        if self.model_copy(update={"seal": ""}).digest() != self.seal:
            raise InputError("the manifest was changed after it was written; compile the bundle again")

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file but the manifest itself."""
        return (self.plan, self.graphs, *self.artifacts, *self.shared)

    def artifact_of(self, segment: str) -> Artifact | None:
        """The artifact that runs the launch of this name."""
        return next((artifact for artifact in self.artifacts if segment in artifact.segments), None)


def segment_name(segment: Segment) -> str:
    """`partition[stages]`, with `x2` when both branches are batched: equal for launches of the same graph."""
    batched = f" x{len(segment.branches)}" if len(segment.branches) > 1 else ""
    return f"{segment.partition}[{','.join(map(str, segment.stages))}]{batched}"
