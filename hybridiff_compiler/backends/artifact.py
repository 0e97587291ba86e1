"""The contract of backends whose executables live in files: build a stage graph into a file, load it elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..capture import StageGraph
from ..ir import UsageError
from .onnx_weights import OnnxWeights
from .stage_io import StageInterface
from .target import Target

__all__ = ["ARTIFACT_BACKENDS", "ArtifactBackend", "Executable", "Job", "artifact_backend", "strongest_backend"]

Executable = Callable[..., Sequence[Tensor]]
"""Has the calling convention of `StageGraph.module`."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage graph to build."""

    stage: StageGraph
    folder: Path
    """Where the file goes; files that artifacts share lie there, too."""
    name: str
    """The file's name without its ending."""
    target: Target
    weights: OnnxWeights
    """The one file of weights in `folder`; used by backends that store weights apart."""


class ArtifactBackend(Protocol):
    """One backend; stateless."""

    name: str
    binds_weights: bool
    """Whether the file is without weights and reads the live parameters; otherwise it is only good for the weights
    that it was built with."""
    shared: tuple[str, ...]
    """Names of files that all artifacts of one folder share."""

    def missing(self) -> str | None:
        """What must be installed to build with this backend here; None when it is all there."""

    def versions(self) -> dict[str, str]:
        """Versions here of the libraries that must be the same ones when the artifact is loaded."""

    def target(self, device: str, dtype: str, arch: str | None) -> Target:
        """The target for ranks on `device`; `arch` None means this machine's.

        Raises:
            UsageError: the backend cannot build for it.
        """

    def build(self, job: Job) -> Path:
        """Write the artifact and return its path."""

    def load(self, file: Path, stage: StageInterface) -> Executable:
        """An executable from a file whose hash has been checked; `stage` tells what it was built from."""


def _all() -> dict[str, ArtifactBackend]:
    from .aotinductor import AotInductor
    from .onnx_file import OnnxFiles
    from .tensorrt import TensorRt, TensorRtRtx

    return {backend.name: backend for backend in (AotInductor(), OnnxFiles(), TensorRt(), TensorRtRtx())}


ARTIFACT_BACKENDS = ("aotinductor", "onnx", "tensorrt", "tensorrt-rtx")
"""Names, strongest default first; see `strongest_backend`."""


def artifact_backend(name: str) -> ArtifactBackend:
    """The backend called `name`.

    Raises:
        UsageError: there is none of that name.
    """
    backends = _all()
    if name not in backends:
        raise UsageError(f"unknown backend {name!r}; bundles are built with {', '.join(ARTIFACT_BACKENDS)}")
    return backends[name]


def strongest_backend(device: str) -> str:
    """The backend that `hybridiff compile` uses unless told otherwise: the fastest one that has been run on `device`.

    Raises:
        UsageError: nothing that is needed to build is installed.
    """
    reasons = []
    for name in ("aotinductor", *(["onnx"] if device == "cpu" else [])):
        missing = artifact_backend(name).missing()
        if missing is None:
            return name
        reasons.append(f"{name} {missing}")
    raise UsageError(f"no backend can build a bundle for {device} here: {'; '.join(reasons)}")
