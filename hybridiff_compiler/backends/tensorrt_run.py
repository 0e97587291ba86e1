"""Running TensorRT engines: bindings on static buffers, execution on the present CUDA stream.

No engine has been run so far: TensorRT for RTX supports none of the GPUs that could be reached (H100, H200). What can
be told without one is tested against a stand-in for the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..ir import InputError, PlanMismatchError
from .stage_io import TensorSpec, fit_arguments

__all__ = ["EngineStage", "collecting_logger"]


class EngineStage:
    """One engine with an execution context; results stay in buffers that the next call overwrites."""

    def __init__(
        self, trt: Any, engine: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], *,
        by_position: bool = False, device: str | torch.device = "cuda",
    ) -> None:
        """
        Args:
            trt: the package of TensorRT or of TensorRT for RTX.
            engine: serialized; its hash has been checked.
            inputs: the stage's arguments in order.
            outputs: the stage's results in order.
            by_position: bindings have the stage's order but names of their own.
            device: where the buffers are.

        Raises:
            PlanMismatchError: the library does not accept the engine, for another GPU or version for example.
            InputError: the engine's bindings are not those of the stage.
        """
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        with self._on_device():
            self._load(trt, engine, tuple(inputs), tuple(outputs), by_position)

    def _load(
        self, trt: Any, engine: bytes, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...],
        by_position: bool,
    ) -> None:
        self._logger, errors = collecting_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            reason = f" ({errors[-1].strip()})" if errors else ""
            raise PlanMismatchError(
                f"{trt.__name__} {trt.__version__} does not accept the engine on this GPU{reason}; run `hybridiff "
                "compile` again for it, or use --backend aotinductor"
            )
        self._inputs, self._outputs = inputs, outputs
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        takes = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        gives = [name for name in names if name not in takes]
        self._input_names = _match(takes, self._inputs, by_position, "inputs")
        self._output_names = _match(gives, self._outputs, by_position, "outputs")
        for name, spec in zip(self._input_names + self._output_names, (*self._inputs, *self._outputs)):
            if tuple(self._engine.get_tensor_shape(name)) != spec.shape:
                raise InputError(f"binding {name} has shape {tuple(self._engine.get_tensor_shape(name))}, the stage "
                                 f"needs {spec}; compile the bundle again")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise PlanMismatchError(
                f"{trt.__name__} {trt.__version__} cannot run the engine on this GPU (out of memory, or a GPU that it "
                "does not know); see its messages above"
            )
        self._buffers = [self._buffer(spec) for spec in self._inputs]
        self._results = [self._buffer(spec) for spec in self._outputs]
        for name, buffer in zip(self._input_names + self._output_names, self._buffers + self._results):
            if not self._context.set_tensor_address(name, buffer.data_ptr()):
                raise InputError(f"the engine refuses the address of binding {name}; compile the bundle again")

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """Run on the present stream; may be captured in a CUDA graph, since addresses never change.

        Raises:
            InputError: arguments of other shapes or dtypes than compiled, or the library failed.
        """
        for buffer, argument in zip(self._buffers, fit_arguments(arguments, self._inputs)):
            buffer.copy_(argument)
        stream = self._stream()
        if self._is_capturing() and not self._context.is_stream_capturable(stream):
            raise InputError("the engine cannot be recorded as a CUDA graph; use --backend aotinductor for this plan")
        if not self._context.execute_async_v3(stream):
            raise InputError("the engine could not be launched; see the messages of TensorRT above")
        return self._results

    def _buffer(self, spec: TensorSpec) -> Tensor:
        return torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=self._device)

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _is_capturing(self) -> bool:
        return (
            self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            and hasattr(self._context, "is_stream_capturable")
        )

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream) if self._device.type == "cuda" else 0


def _match(names: list[str], specs: Sequence[TensorSpec], by_position: bool, kind: str) -> list[str]:
    """The binding of every spec, in the order of the specs."""
    wanted = [spec.name for spec in specs]
    if set(names) == set(wanted):
        return wanted
    if by_position and len(names) == len(wanted):
        return names
    raise InputError(f"the engine's {kind} are {names}, the stage needs {wanted}; compile the bundle again")


def collecting_logger(trt: Any) -> tuple[Any, list[str]]:
    """A logger that keeps errors for the exception and drops the rest."""
    errors: list[str] = []

    class Collecting(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                errors.append(message)

    return Collecting(), errors
