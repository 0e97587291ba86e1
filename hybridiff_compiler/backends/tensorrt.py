"""TensorRT and TensorRT for RTX: the stage's ONNX file through NVIDIA's parser and builder into an engine.

Both packages have the same Python interface, so one code serves both. TensorRT for RTX builds engines for other GPUs on
a machine that has none; TensorRT builds for the GPU at hand, by way of torch-tensorrt where that is installed. What
runs engines is in `tensorrt_run.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..capture import StageGraph
from ..ir import InputError, UsageError
from .artifact import Executable, Job
from .onnx_file import export_onnx, missing_exporter
from .onnx_weights import OnnxWeights
from .stage_io import StageInterface, TensorSpec, example_arguments, stage_inputs, stage_outputs
from .target import Target, cuda_arch
from .tensorrt_run import collecting_logger

__all__ = ["CURRENT", "RTX_ARCHITECTURES", "TensorRt", "TensorRtRtx", "build_engine", "load_library"]

RTX_ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""GPUs that TensorRT for RTX can build for wherever it runs. Hopper (sm_90) is not among them."""

CURRENT = "CURRENT"
"""Target that means the GPU of this machine; the library decides whether it can build for it."""

_RTX_PACKAGES = ("tensorrt_rtx", "tensorrt_rtx_bindings")
_PLAIN_PACKAGES = ("tensorrt",)


class _Engines:
    """What both backends share; see `ArtifactBackend`."""

    name: str
    binds_weights = False
    shared: tuple[str, ...] = ()
    packages: tuple[str, ...]
    """Names under which the library can be installed."""
    remedy: str

    def missing(self) -> str | None:
        """See `ArtifactBackend.missing`."""
        if not any(importlib.util.find_spec(name) for name in self.packages):
            return f"needs the package {' or '.join(self.packages)} ({self.remedy})"
        return missing_exporter()

    def versions(self) -> dict[str, str]:
        """See `ArtifactBackend.versions`."""
        installed = any(importlib.util.find_spec(name) for name in self.packages)
        library = {self.name: str(self.library().__version__)} if installed else {}
        return {"torch": torch.__version__.partition("+")[0], **library}

    def library(self) -> Any:
        """The Python package of the library."""
        return load_library(self.packages)

    def build(self, job: Job) -> Path:
        """See `ArtifactBackend.build`."""
        with tempfile.TemporaryDirectory(prefix="hybridiff-onnx-") as folder:
            file = export_onnx(job.stage, Path(folder) / "stage.onnx", OnnxWeights(Path(folder)))
            engine = build_engine(
                self.library(), file, job.target.arch, stage_inputs(job.stage), stage_outputs(job.stage)
            )
        return _write(job, engine)

    def load(self, file: Path, stage: StageInterface) -> Executable:
        """See `ArtifactBackend.load`."""
        from .tensorrt_run import EngineStage

        return EngineStage(
            self.library(), file.read_bytes(), stage.inputs, stage.outputs, device=_gpu(stage.weights)
        )


class TensorRtRtx(_Engines):
    """TensorRT for RTX; builds without a GPU."""

    name = "tensorrt-rtx"
    packages = _RTX_PACKAGES
    remedy = "pip install 'hybridiff-compiler[tensorrt-rtx]'"

    def target(self, device: str, dtype: str, arch: str | None) -> Target:
        """See `ArtifactBackend.target`."""
        _need_cuda_ranks(self.name, device)
        here = cuda_arch() if torch.cuda.is_available() else None
        if arch is None or arch.upper() == CURRENT:
            if here is None:
                raise UsageError(
                    f"this machine has no GPU to build for; name one with --target, {', '.join(RTX_ARCHITECTURES)}"
                )
            arch = here
        if arch not in (*RTX_ARCHITECTURES, here):
            raise UsageError(
                f"tensorrt-rtx builds for {', '.join(RTX_ARCHITECTURES)}, or by --target {CURRENT} for this machine's "
                f"GPU, got {arch}; use --backend aotinductor on other GPUs"
            )
        return Target(device="cuda", arch=arch, dtype=dtype, versions=self.versions())


class TensorRt(_Engines):
    """TensorRT for the GPU at hand."""

    name = "tensorrt"
    packages = _PLAIN_PACKAGES
    remedy = "pip install 'hybridiff-compiler[tensorrt]'"

    def target(self, device: str, dtype: str, arch: str | None) -> Target:
        """See `ArtifactBackend.target`."""
        _need_cuda_ranks(self.name, device)
        if not torch.cuda.is_available():
            raise UsageError(
                "tensorrt builds for the GPU of the machine that it runs on, and this machine has none; compile on the "
                "GPU machine, or use --backend tensorrt-rtx, which needs no GPU"
            )
        here = cuda_arch()
        if arch not in (None, here):
            raise UsageError(f"tensorrt builds for this machine's GPU ({here}) only, got target {arch}")
        return Target(device="cuda", arch=here, dtype=dtype, versions=self.versions())

    def build(self, job: Job) -> Path:
        """See `ArtifactBackend.build`."""
        if importlib.util.find_spec("torch_tensorrt") is None:
            return super().build(job)
        return _write(job, _engine_by_torch_tensorrt(job.stage))

    def load(self, file: Path, stage: StageInterface) -> Executable:
        """See `ArtifactBackend.load`."""
        from .tensorrt_run import EngineStage

        # torch-tensorrt names bindings its own way; their order is the stage's in either case.
        return EngineStage(
            self.library(), file.read_bytes(), stage.inputs, stage.outputs, by_position=True,
            device=_gpu(stage.weights),
        )


def load_library(packages: tuple[str, ...]) -> Any:
    """The first of `packages` that is installed.

    Raises:
        UsageError: none is.
    """
    for name in packages:
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise UsageError(f"none of the packages {', '.join(packages)} is installed")


def build_engine(
    trt: Any, onnx_file: Path, arch: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> bytes:
    """Build the engine of one ONNX file.

    Args:
        trt: the package of TensorRT or of TensorRT for RTX.
        onnx_file: its external data lies beside it.
        arch: e.g. `sm_89`. One that TensorRT for RTX has no name for must be the GPU at hand; TensorRT itself takes
            the GPU at hand whatever this says.
        inputs: what the engine's bindings must be.
        outputs: as `inputs`.

    Raises:
        InputError: the network cannot be parsed or built, or has other bindings.
    """
    logger, errors = collecting_logger(trt)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)] or errors
        raise InputError(f"{trt.__name__} cannot parse the stage: {'; '.join(reasons[:2])}")
    _check_bindings(trt, network, inputs, outputs)
    config = builder.create_builder_config()
    if hasattr(trt, "ComputeCapability"):
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, arch.replace("sm_", "SM"), trt.ComputeCapability.CURRENT)
        if not config.set_compute_capability(capability, 0):
            raise InputError(f"{trt.__name__} {trt.__version__} refuses to build for {arch}; choose another --target")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise InputError(f"{trt.__name__} cannot build an engine for {arch}: {'; '.join(errors[:2]) or 'no reason'}")
    return bytes(engine)


def _check_bindings(trt: Any, network: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Names, shapes and dtypes of the network against the plan's."""
    for kind, specs, count, get in (
        ("inputs", inputs, network.num_inputs, network.get_input),
        ("outputs", outputs, network.num_outputs, network.get_output),
    ):
        found = {t.name: (tuple(t.shape), t.dtype) for t in map(get, range(count))}
        wanted = {spec.name: (spec.shape, _trt_dtype(trt, spec.dtype)) for spec in specs}
        if found != wanted:
            raise InputError(f"the engine's {kind} are {found}, the plan says {wanted}")


def _trt_dtype(trt: Any, name: str) -> Any:
    short = {"float16": "HALF", "float32": "FLOAT", "bfloat16": "BF16"}
    return getattr(trt.DataType, short.get(name, name.upper()))


def _engine_by_torch_tensorrt(stage: StageGraph) -> bytes:
    """An engine by torch-tensorrt's converters. Never run: no machine with TensorRT's own library was at hand."""
    torch_tensorrt = importlib.import_module("torch_tensorrt")
    arguments = example_arguments(stage)
    with torch.no_grad():
        program = torch.export.export(stage.module, arguments, strict=False)
    engine: bytes = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
        program, arg_inputs=arguments, use_explicit_typing=True, require_full_compilation=True
    )
    return bytes(engine)


def _gpu(weights: Mapping[str, Tensor]) -> torch.device:
    """Where the denoiser is."""
    return next((tensor.device for tensor in weights.values() if tensor.is_cuda), torch.device("cuda"))


def _need_cuda_ranks(name: str, device: str) -> None:
    if device != "cuda":
        raise UsageError(
            f"{name} engines run on GPUs and the plan is for ranks on {device!r}; plan from a profile that was "
            "measured on a GPU"
        )


def _write(job: Job, engine: bytes) -> Path:
    file = job.folder / f"{job.name}.engine"
    file.write_bytes(engine)
    return file
