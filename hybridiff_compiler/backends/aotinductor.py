"""AOTInductor: a stage compiled into a `.pt2` package without weights, which reads the live parameters.

The parameters are bound by their qualified names as they lie in memory, so edits in place (fusing a LoRA) are seen at
once; parameters whose memory was exchanged are bound anew at the next call. A package that is run before its parameters
are bound crashes the process, so nothing but `AotStage` ever holds one.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..capture import StageGraph
from ..ir import InputError, PlanMismatchError, UsageError
from .artifact import Executable, Job
from .stage_io import TensorSpec, example_arguments, fit_arguments, stage_inputs, stage_weights
from .target import Target, cpu_arch, cuda_arch

__all__ = ["AotInductor", "AotStage"]

_OPTIONS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    # Otherwise the number of threads at compile time is written into the code.
    "cpp.dynamic_threads": True,
}


class AotStage:
    """A loaded package; it can be called once `bind` has given it its weights."""

    def __init__(self, package: Any, inputs: Sequence[TensorSpec]) -> None:
        """
        Args:
            package: what torch loaded; it must not be called by anyone else.
            inputs: the arguments that the package was compiled for.
        """
        self._package = package
        self._inputs = tuple(inputs)
        self._weights: dict[str, Tensor] = {}
        self._bound: list[Tensor] = []
        self._addresses: list[int] | None = None

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Qualified names of the tensors that the package reads."""
        return tuple(self._package.get_constant_fqns())

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
        results: Sequence[Tensor] = self._package(*fitted)
        return results

    def _bind_addresses(self) -> None:
        self._addresses = None
        # Views keep the memory alive that the package points to, whatever happens to the parameters.
        aliases = {name: tensor.detach() for name, tensor in self._weights.items()}
        strided = [name for name, tensor in aliases.items() if not tensor.is_contiguous()]
        if strided:
            raise InputError(
                f"{len(strided)} weights are not contiguous ({', '.join(strided[:3])}), compiled code reads them as if "
                "they were; call .contiguous() on them"
            )
        if aliases:
            self._package.load_constants(aliases, check_full_update=True, user_managed=True)
        self._bound = list(aliases.values())
        self._addresses = [tensor.data_ptr() for tensor in self._weights.values()]


class AotInductor:
    """The backend; see `ArtifactBackend`."""

    name = "aotinductor"
    binds_weights = True
    shared: tuple[str, ...] = ()

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        """`options`: inductor options on top of the ones that make a package without weights."""
        self._options = _OPTIONS | dict(options or {})

    def missing(self) -> str | None:
        """See `ArtifactBackend.missing`."""
        if any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            return None
        return "needs a C++ compiler (install g++ or clang++)"

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
        file = job.folder / f"{job.name}.pt2"
        arguments = example_arguments(job.stage)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(job.stage.module, arguments, strict=False)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(file), inductor_configs=dict(self._options)
            )
        package = _open_package(file)
        unknown = sorted(set(package.get_constant_fqns()) - stage_weights(job.stage).keys())
        if unknown:
            raise InputError(f"aotinductor made constants of its own ({', '.join(unknown[:3])}), which have no live "
                             "parameter to be bound to; use --backend onnx for this denoiser")
        return file

    def load(self, file: Path, stage: StageGraph) -> Executable:
        """See `ArtifactBackend.load`."""
        executable = AotStage(_open_package(file), stage_inputs(stage))
        executable.bind(stage_weights(stage))
        return executable


def _open_package(file: Path) -> Any:
    """Load a package by its C++ loader alone: torch's Python loaders also look for pickled parts."""
    from torch.export.pt2_archive._package import AOTICompiledModel

    # One runner without locks: what CUDA graph capture needs; a stage is never run from two threads.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", True, 1, -1)
    return AOTICompiledModel(loader)
