"""ONNX: one file per stage with the plan's names, all weights in one file beside them; run by onnxruntime on CPUs."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..capture import StageGraph
from ..ir import InputError
from .artifact import Executable, Job
from .onnx_weights import WEIGHTS_FILE, OnnxWeights
from .stage_io import StageInterface, TensorSpec, example_arguments, stage_inputs, stage_outputs
from .target import ANY, Target

__all__ = ["OPSET", "OnnxFiles", "export_onnx", "missing_exporter"]

OPSET = 20
_aten = torch.ops.aten
_CONCATENATIONS = {_aten.cat.default, _aten.concat.default, _aten.concatenate.default}


class OnnxFiles:
    """The backend; see `ArtifactBackend`."""

    name = "onnx"
    binds_weights = False
    shared: tuple[str, ...] = (WEIGHTS_FILE,)

    def missing(self) -> str | None:
        """See `ArtifactBackend.missing`."""
        return missing_exporter("onnxruntime")

    def versions(self) -> dict[str, str]:
        """See `ArtifactBackend.versions`."""
        return {"torch": torch.__version__}

    def target(self, device: str, dtype: str, arch: str | None) -> Target:
        """See `ArtifactBackend.target`."""
        return Target(device="cpu" if device == "cpu" else "cuda", arch=ANY, dtype=dtype, versions=self.versions())

    def build(self, job: Job) -> Path:
        """See `ArtifactBackend.build`."""
        return export_onnx(job.stage, job.folder / f"{job.name}.onnx", job.weights)

    def load(self, file: Path, stage: StageInterface) -> Executable:
        """See `ArtifactBackend.load`."""
        from .onnx_run import OnnxStage

        return OnnxStage(file, stage.inputs, stage.outputs)


def missing_exporter(*further: str) -> str | None:
    """What must be installed to export ONNX, and `further` packages; None when it is all there."""
    absent = [name for name in ("onnx", "onnxscript", *further) if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(absent)} (pip install 'hybridiff-compiler[onnx]')" if absent else None


def export_onnx(stage: StageGraph, file: Path, weights: OnnxWeights) -> Path:
    """Write the stage as ONNX; its weights are added to `weights`, which lie in the same folder.

    Inputs and outputs are named after the denoiser's leaf paths, the values between layers, and `estimate`.

    Raises:
        InputError: the exporter or the ONNX checker refuses the stage.
    """
    import onnx
    import onnx_ir

    module = _with_equal_concatenations(stage.module)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module, example_arguments(stage), dynamo=True, opset_version=OPSET, verbose=False, optimize=True
            )
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"the stage cannot be exported to ONNX: {reason}") from error
    assert program is not None
    model = program.model
    _rename(model.graph.inputs, stage_inputs(stage))
    _rename(model.graph.outputs, stage_outputs(stage))
    _drop_notes(model)
    weights.externalize(model)
    onnx_ir.save(model, file)
    onnx.checker.check_model(str(file), full_check=False)
    return file


def _rename(values: Any, specs: tuple[TensorSpec, ...]) -> None:
    """Give the graph's inputs or outputs the plan's names; shapes and dtypes must be the plan's already."""
    found = [(tuple(value.shape), value.dtype.name.lower()) for value in values]
    wanted = [(spec.shape, _onnx_dtype(spec.dtype)) for spec in specs]
    if found != wanted:
        raise InputError(f"the exported stage has inputs or outputs {found}, the plan says {wanted}")
    if len({id(value) for value in values}) != len(values):
        raise InputError("the exported stage returns one tensor under two names; ONNX names each output once")
    for value, spec in zip(values, specs):
        value.name = spec.name


def _onnx_dtype(name: str) -> str:
    short = {"float32": "float", "float64": "double"}
    return short.get(name, name)


def _drop_notes(model: Any) -> None:
    """Remove what the exporter remarks for debugging: source lines and file names have no place in an artifact."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    model.doc_string = None
    model.producer_version = None


def _with_equal_concatenations(module: fx.GraphModule) -> fx.GraphModule:
    """`module` with the inputs of every concatenation cast to one dtype first, as torch does by itself.

    The exporter leaves such casts out, and TensorRT then refuses the network.
    """
    mixed = [node for node in module.graph.nodes if node.target in _CONCATENATIONS and _cat_dtypes(node) > 1]
    if not mixed:
        return module
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        casts: dict[fx.Node, fx.Node] = {}
        if node in mixed:
            dtype = node.meta["val"].dtype
            casts = {s: _cast(graph, copied[s], dtype) for s in node.args[0] if s.meta["val"].dtype != dtype}
        known = copied | casts if casts else copied
        copied[node] = graph.node_copy(node, known.__getitem__)
    return fx.GraphModule(module, graph, class_name="Stage").eval()


def _cat_dtypes(node: fx.Node) -> int:
    tensors: Any = node.args[0]
    return len({source.meta["val"].dtype for source in tensors})


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    cast = graph.call_function(_aten._to_copy.default, (node,), {"dtype": dtype})
    cast.meta["val"] = pytree.tree_map_only(torch.Tensor, lambda value: value.to(dtype), node.meta["val"])
    return cast


@contextmanager
def _quiet() -> Iterator[None]:
    """Advice of the exporter for its own callers is not for ours."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
