"""Running an ONNX stage by onnxruntime on a CPU, reading and writing torch's memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..ir import InputError
from .stage_io import TensorSpec, fit_arguments

__all__ = ["OnnxStage"]


class OnnxStage:
    """One onnxruntime session; inputs are read in place and every call returns new tensors."""

    def __init__(self, file: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """
        Raises:
            InputError: onnxruntime cannot run the file, or it has other inputs and outputs.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"{file.name}: onnxruntime cannot run it on this CPU: {reason}") from None
        for kind, values, specs in (
            ("inputs", self._session.get_inputs(), inputs), ("outputs", self._session.get_outputs(), outputs)
        ):
            got, expected = sorted(value.name for value in values), sorted(spec.name for spec in specs)
            if got != expected:
                raise InputError(f"{file.name}: has {kind} {got}, the plan needs {expected}")
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """Run the stage.

        Raises:
            InputError: arguments of other shapes or dtypes than exported.
        """
        fitted = fit_arguments(arguments, self._inputs)
        results = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="cpu") for spec in self._outputs]
        binding = self._session.io_binding()
        for spec, tensor in zip(self._inputs, fitted):
            binding.bind_input(spec.name, "cpu", 0, _element_type(tensor.dtype), spec.shape, tensor.data_ptr())
        for spec, tensor in zip(self._outputs, results):
            binding.bind_output(spec.name, "cpu", 0, _element_type(tensor.dtype), spec.shape, tensor.data_ptr())
        self._session.run_with_iobinding(binding)
        return results


def _element_type(dtype: torch.dtype) -> int:
    """ONNX's number for a dtype; bfloat16 has none among numpy's."""
    from onnx import TensorProto

    names = {torch.float32: "FLOAT", torch.float64: "DOUBLE"}
    return int(TensorProto.DataType.Value(names.get(dtype, str(dtype).removeprefix("torch.").upper())))
