"""Stage graphs out of a bundle: executables on the live weights, without a capture."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backends.artifact import Executable, artifact_backend
from ..backends.stage_io import ESTIMATE, StageInterface, TensorSpec, weights_digest
from ..ir import CallSignature, InputError, LayerGraph, Partition, Plan, PlanMismatchError, Segment
from .files import check_file, read_text
from .graphs import CONSTANTS_FILE, GraphRecord, Graphs
from .manifest import Artifact, Manifest, segment_name
from .reading import check_once, named_bundle

__all__ = ["StoredGraphs", "StoredStage", "open_graphs"]


@dataclass(frozen=True)
class StoredStage:
    """A loaded stage graph with the names of its arguments and results."""

    call: Executable
    inputs: tuple[str, ...]
    """Leaf paths of the denoiser's inputs: the first arguments."""
    values_in: tuple[str, ...]
    """Names of values: the other arguments."""
    values_out: tuple[str, ...]
    """Names of the values that it returns, after the estimate."""
    specs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Shape and dtype of every argument."""


def open_graphs(backend: str, denoiser: nn.Module) -> StoredGraphs:
    """The graphs of the bundle that `backend` (from `Bundle.backend`) names, for `denoiser`.

    Raises:
        InputError: the bundle is damaged, or was changed since it was opened.
        PlanMismatchError: it was compiled for another denoiser, another machine or other versions.
    """
    root, manifest = named_bundle(backend)
    plan = Plan.parse(read_text(check_file(root, manifest.plan)), source=str(root / manifest.plan.file))
    graphs = Graphs.parse(read_text(check_file(root, manifest.graphs)), source=str(root / manifest.graphs.file))
    graphs.identity.check(denoiser)
    return StoredGraphs(root, manifest, plan, graphs, denoiser)


class StoredGraphs:
    """The stage graphs of one bundle, to be run with the weights of one denoiser."""

    def __init__(self, root: Path, manifest: Manifest, plan: Plan, graphs: Graphs, denoiser: nn.Module) -> None:
        """Use `open_graphs`, which checks all of these."""
        self._root, self._manifest, self._plan, self._graphs = root, manifest, plan, graphs
        self._denoiser = denoiser
        self._constants: dict[str, Tensor] | None = None

    @property
    def layers(self) -> LayerGraph:
        """The layer graph of the denoiser."""
        return self._graphs.layers

    @property
    def estimate(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one branch's estimate."""
        return _shape_and_dtype(self._graphs.estimate)

    def check_covers(self, signature: CallSignature, partitions: Iterable[Partition]) -> None:
        """Refuse tables that were not compiled.

        Raises:
            PlanMismatchError: another call, or a partition that the bundle's plan does not have.
        """
        mismatch = self._plan.model.signature.mismatch(signature)
        if mismatch is not None:
            raise PlanMismatchError(f"{self._root}: the bundle is for another call of the denoiser: {mismatch}")
        unknown = [partition.name for partition in partitions if partition not in self._plan.partitions]
        if unknown:
            raise PlanMismatchError(
                f"{self._root}: the bundle was compiled without the partitions {unknown}; compile this plan"
            )

    def stage(self, segment: Segment, taps: Sequence[str]) -> StoredStage:
        """Load the graph of `segment`, which must return the values `taps`.

        Raises:
            InputError: the bundle is damaged.
            PlanMismatchError: it holds no such graph, or one for other weights.
        """
        name = segment_name(segment)
        artifact = self._manifest.artifact_of(name)
        record = None if artifact is None else self._graphs.record(artifact.graph)
        if artifact is None or record is None:
            raise PlanMismatchError(
                f"{self._root}: no artifact for the stage graph {name}; the bundle holds "
                f"{len(self._manifest.artifacts)} others; compile the plan again"
            )
        names = [spec.name for spec in artifact.outputs]
        wanted = [*([ESTIMATE] if segment.has_estimate else []), *taps]
        if names != wanted:
            raise PlanMismatchError(
                f"{self._root}: {artifact.file} has other outputs ({_some(names)}) than the plan needs "
                f"({_some(wanted)}); compile it again"
            )
        weights = {spec.name: self._weight(spec) for spec in record.weights}
        if artifact.weights is not None and artifact.weights != weights_digest(weights):
            raise PlanMismatchError(
                f"{self._root}: {artifact.file} was built with other weights than this denoiser's, which are part of "
                f"{self._manifest.backend} artifacts; compile the bundle again, or use --backend aotinductor, which "
                "reads the live weights"
            )
        return self._load(artifact, record, StageInterface(artifact.inputs, artifact.outputs, weights), len(taps))

    def _load(self, artifact: Artifact, record: GraphRecord, interface: StageInterface, taps: int) -> StoredStage:
        for shared in self._manifest.shared:
            check_once(self._root, shared.file, self._manifest.seal)
        call = artifact_backend(self._manifest.backend).load(check_file(self._root, artifact), interface)
        names = tuple(spec.name for spec in artifact.inputs)
        outputs = tuple(spec.name for spec in artifact.outputs)
        return StoredStage(
            call=call, inputs=names[:record.leaves], values_in=names[record.leaves:],
            values_out=outputs[len(outputs) - taps:], specs=tuple(map(_shape_and_dtype, artifact.inputs)),
        )

    def _weight(self, spec: TensorSpec) -> Tensor:
        """The live tensor of a name, or a constant of the bundle."""
        try:
            tensor = operator.attrgetter(spec.name)(self._denoiser)
        except AttributeError:
            tensor = self._constant(spec.name)
        if tensor is None or (tuple(tensor.shape), tensor.dtype) != _shape_and_dtype(spec):
            got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise PlanMismatchError(
                f"{self._root}: the compiled denoiser reads {spec}, this one has {got} of that name; compile the "
                "bundle again for this denoiser"
            )
        return tensor

    def _constant(self, name: str) -> Tensor | None:
        if self._constants is None:
            self._constants = self._read_constants()
        return self._constants.get(name)

    def _read_constants(self) -> dict[str, Tensor]:
        record = next((record for record in self._manifest.shared if record.file == CONSTANTS_FILE), None)
        if record is None:
            return {}
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(check_file(self._root, record).read_bytes())
        except SafetensorError as error:
            raise InputError(f"{self._root / record.file}: is no file of tensors ({error}); compile again") from None
        device = next(self._denoiser.parameters()).device
        follows = {constant.name for constant in self._graphs.constants if constant.follows}
        return {name: tensor.to(device) if name in follows else tensor for name, tensor in tensors.items()}


def _shape_and_dtype(spec: TensorSpec) -> tuple[tuple[int, ...], torch.dtype]:
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{spec}: torch has no dtype of this name; compile the bundle again")
    return spec.shape, dtype


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
