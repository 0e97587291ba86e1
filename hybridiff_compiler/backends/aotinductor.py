"""AOTInductor: a stage compiled into a `.pt2` package without weights, which reads the live parameters.

The parameters are bound by their qualified names as they lie in memory, so edits in place (fusing a LoRA) are seen at
once; parameters whose memory was exchanged are bound anew at the next call. A package that is run before its parameters
are bound crashes the process, so nothing but `AotStage` ever holds one.

The compiler writes the values of very small constants into the code. A weight that small (the bias of an output
convolution has four elements) is made an argument instead, so that it stays live like the others.

What is done to a stage before it is compiled (see `merging` and `hoisting`) is the same as for `inductor`. A stage of
which a part was hoisted is a package of two models; the package's metadata says which weights were merged and which
arguments the hoisted part takes.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..capture import StageGraph
from ..ir import InputError, PlanMismatchError, UsageError
from .artifact import Executable, Job
from .cpp_compiler import NO_COMPILER, sharing_compiler
from .hoisting import Hoisted, hoist
from .merging import join_parameters, merge_linears
from .stage_io import StageInterface, TensorSpec, example_arguments, fit_arguments, stage_inputs, stage_weights
from .target import Target, cpu_arch, cuda_arch
from .unpacking import unpacking

__all__ = ["AotInductor", "AotStage"]

_OPTIONS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    # Otherwise the number of threads at compile time is written into the code.
    "cpp.dynamic_threads": True,
}
_ON_GPUS: dict[str, Any] = {
    # The host's part of the code runs only until it is recorded as a CUDA graph; optimising it takes longer than that.
    "aot_inductor.compile_wrapper_opt_level": "O0",
}
_INLINED_ELEMENTS = 8
"""Vectors and scalars of up to so many elements are written into the code by inductor."""
_EACH, _ONCE, _TIMED = "model", "once", "timed"
"""Names of the models in a package: the stage, or what remained of it, and what was hoisted (see `hoisting`)."""
_METADATA = "hybridiff"


class AotStage:
    """A loaded package; it can be called once `bind` has given it its weights."""

    def __init__(
        self, package: Any, inputs: Sequence[TensorSpec], passed: Sequence[str] = (), *,
        merged: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """
        Args:
            package: torch's loader of the package; it must not be run by anyone else.
            inputs: the arguments that the package was compiled for.
            passed: names of the weights that it takes as further arguments.
            merged: the weights that a merged one of the package consists of, by its name.
        """
        self._package = package
        self._inputs, self._passed, self._merged = tuple(inputs), tuple(passed), dict(merged or {})
        self._constants = tuple(package.get_constant_fqns())
        self._weights: dict[str, Tensor] = {}
        self._bound: list[Tensor] = []
        self._small: list[Tensor] = []
        self._addresses: list[int] | None = None

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Qualified names of the denoiser's tensors that the package reads."""
        return (*(part for name in self._constants for part in self._merged.get(name, (name,))), *self._passed)

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Give the package its weights; their memory is used as it is.

        Args:
            weights: at least the tensors of `weight_names`.

        Raises:
            PlanMismatchError: one is missing.
        """
        missing = [name for name in self.weight_names if name not in weights]
        if missing:
            raise PlanMismatchError(
                f"the package reads {len(missing)} tensors that the denoiser lacks ({', '.join(missing[:3])}); compile "
                "the bundle again for this denoiser"
            )
        self._weights = {name: weights[name] for name in self.weight_names}
        self._bind_addresses()

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """Run the stage.

        Raises:
            UsageError: the weights have not been bound.
            InputError: arguments of other shapes or dtypes than compiled.
        """
        if self._addresses is None:
            raise UsageError("the package has no weights yet; call bind() before running it")
        if [tensor.data_ptr() for tensor in self._weights.values()] != self._addresses:
            self._bind_addresses()
        fitted = fit_arguments(arguments, self._inputs)
        results: Sequence[Tensor] = self._package.boxed_run([*fitted, *self._small])
        return results

    def _bind_addresses(self) -> None:
        self._addresses = None
        strided = [name for name, tensor in self._weights.items() if not tensor.is_contiguous()]
        if strided:
            raise InputError(
                f"{len(strided)} weights are not contiguous ({', '.join(strided[:3])}), compiled code reads them as if "
                "they were; call .contiguous() on them"
            )
        weights = {
            name: join_parameters([self._weights[part] for part in self._merged[name]]) if name in self._merged
            else self._weights[name]
            for name in (*self._constants, *self._passed)
        }
        # Views keep the memory alive that the package points to, whatever happens to the parameters.
        aliases = {name: tensor.detach() for name, tensor in weights.items()}
        constants = {name: aliases[name] for name in self._constants}
        if constants:
            self._package.load_constants(constants, False, True, True)  # into the active set; all of them; by reference
        self._bound = list(aliases.values())
        self._small = [aliases[name] for name in self._passed]
        self._addresses = [tensor.data_ptr() for tensor in self._weights.values()]


class AotInductor:
    """The backend; see `ArtifactBackend`."""

    name = "aotinductor"
    binds_weights = True
    shared: tuple[str, ...] = ()

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        """`options`: inductor options on top of the ones that make a package without weights."""
        self._options = dict(options or {})

    def missing(self) -> str | None:
        """See `ArtifactBackend.missing`."""
        return NO_COMPILER if sharing_compiler() is None else None

    def versions(self) -> dict[str, str]:
        """See `ArtifactBackend.versions`."""
        return {"torch": torch.__version__}

    def target(self, device: str, dtype: str, arch: str | None) -> Target:
        """See `ArtifactBackend.target`."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                "aotinductor compiles for the GPU of the machine that it runs on, and this machine has none; compile "
                "on the GPU machine, or build engines with --backend tensorrt-rtx, which needs no GPU"
            )
        here = cpu_arch() if device == "cpu" else cuda_arch()
        if arch not in (None, here):
            raise UsageError(f"aotinductor compiles for this machine ({here}) only, got target {arch}")
        return Target(device="cpu" if device == "cpu" else "cuda", arch=here, dtype=dtype, versions=self.versions())

    def build(self, job: Job) -> Path:
        """See `ArtifactBackend.build`."""
        from torch._inductor.package import package_aoti  # not at the top: loading needs no compiler

        file = job.folder / f"{job.name}.pt2"
        compiler = sharing_compiler()
        if compiler is None:
            raise InputError(f"aotinductor {NO_COMPILER}")
        options = _OPTIONS | (_ON_GPUS if job.target.device == "cuda" else {}) | {"cpp.cxx": (None, compiler)}
        merged = merge_linears(job.stage)
        parts = hoist(merged.stage)
        found = {} if parts is None else {_ONCE: parts.once, _TIMED: parts.timed, _EACH: parts.each}
        stages = {name: stage for name, stage in found.items() if stage is not None} or {_EACH: merged.stage}
        small = _small_weights(stage_weights(job.stage))
        noted: dict[str, Any] = {"merged": dict(merged.sources)}
        if parts is not None:
            noted |= {_ONCE: parts.once_takes, _TIMED: parts.timed_takes}
            noted["takes"] = {
                name: [spec.model_dump() for spec in stage_inputs(stage)] for name, stage in stages.items()
            }
        options |= {"aot_inductor.package": True, "aot_inductor.metadata": {_METADATA: json.dumps(noted)}}
        # Stages may have a part in common, whose files would otherwise be written by several builders at once.
        with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            files = {}
            for name, stage in stages.items():
                own = {"aot_inductor.output_path": str(Path(folder).resolve() / name)}
                files[name] = _compile(stage, small, options | self._options | own)
            package_aoti(str(file), files)
        for name, stage in stages.items():
            weights = stage_weights(stage)
            package = _open_package(file, _device_index(weights), name)
            expected, got = weights.keys() - small.keys(), set(package.get_constant_fqns())
            if got != expected:
                raise InputError(
                    f"aotinductor wrote weights into the code or made constants of its own "
                    f"({', '.join(sorted(got ^ expected)[:3])}), which could not follow the live ones; use --backend "
                    "onnx for this denoiser"
                )
        return file

    def load(self, file: Path, stage: StageInterface) -> Executable:
        """See `ArtifactBackend.load`."""
        index, small = _device_index(stage.weights), tuple(_small_weights(stage.weights))
        package = _open_package(file, index)
        noted = json.loads(package.get_metadata().get(_METADATA, "{}"))

        def bound(name: str, inputs: Sequence[TensorSpec]) -> AotStage:
            part = AotStage(
                package if name == _EACH else _open_package(file, index, name), inputs, small,
                merged=noted.get("merged"),
            )
            part.bind(stage.weights)
            return part

        if "takes" not in noted:
            return bound(_EACH, stage.inputs)
        parts = {
            name: bound(name, [TensorSpec(**spec) for spec in takes]) for name, takes in noted["takes"].items()
        }
        return Hoisted(
            once=parts.get(_ONCE), timed=parts.get(_TIMED), each=parts[_EACH], once_takes=tuple(noted[_ONCE]),
            timed_takes=tuple(noted[_TIMED]),
        )


def _compile(stage: StageGraph, small: Mapping[str, Tensor], options: Mapping[str, Any]) -> list[Any]:
    """The files of one model of a package, with the weights `small` as further arguments."""
    module = _with_weights_as_inputs(stage.module, tuple(small))
    arguments = (*example_arguments(stage), *(tensor.detach() for tensor in small.values()))
    program = torch.export.export(module, arguments, strict=False)
    files = torch._inductor.aot_compile(program.module(), arguments, options=dict(options))
    assert isinstance(files, list)
    return files


def _open_package(file: Path, device_index: int = -1, model: str = _EACH) -> Any:
    """Load a package by its C++ loader alone: torch's Python loaders also look for pickled parts.

    Args:
        file: the package.
        device_index: of the GPU that it will run on; -1 on CPUs.
        model: which of its models.
    """
    # One runner without locks: what CUDA graph capture needs; a stage is never run from two threads.
    with unpacking():
        return torch._C._aoti.AOTIModelPackageLoader(str(file), model, True, 1, device_index)


def _device_index(weights: Mapping[str, Tensor]) -> int:
    """The GPU that holds the weights; a package would otherwise take the present one, which may be another."""
    return next((t.device.index for t in weights.values() if t.is_cuda and t.device.index is not None), -1)


def _small_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that the compiler would write into the code."""
    return {
        name: tensor for name, tensor in weights.items()
        if tensor.dim() <= 1 and tensor.numel() <= _INLINED_ELEMENTS
    }


def _with_weights_as_inputs(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """The graph with these of its weights (it need not read them all) as further arguments."""
    if not names:
        return module
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    nodes = list(module.graph.nodes)
    for node in (node for node in nodes if node.op == "placeholder"):
        copied[node] = graph.node_copy(node)
    inputs = {name: graph.placeholder(f"weight_{index}") for index, name in enumerate(names)}
    for node in nodes:
        if node.op == "get_attr" and node.target in inputs:
            copied[node] = inputs[node.target]
        elif node.op != "placeholder":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    return fx.GraphModule(module, graph, class_name="Stage").eval()
