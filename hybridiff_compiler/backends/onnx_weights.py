"""The weights of all ONNX stages of one folder in one file: each tensor is stored once, whoever reads it.

ONNX names external data by file, offset and length, so stages (and the same stage at two batch sizes) can point into
the same file. Tensors are recognised by their bytes, so that ones which the exporter transposed are shared as well.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..ir import InputError

__all__ = ["WEIGHTS_FILE", "OnnxWeights"]

WEIGHTS_FILE = "weights.bin"

_HEADER = b"hybridiff ONNX weights\n"
_ALIGNMENT = 4096
"""Bytes; memory can be mapped at such offsets."""
_INLINE_BYTES = 1024
"""Smaller tensors stay in the ONNX file: shapes and scalars, which optimizers want to see."""


class OnnxWeights:
    """The weights file of one folder while it grows."""

    def __init__(self, folder: Path) -> None:
        """The file is made when the first weights are added."""
        self._folder = folder
        self._places: dict[str, tuple[int, int]] = {}
        self._size = 0

    def externalize(self, model: Any) -> None:
        """Move the large initializers of an `onnx_ir` model into the file, in place.

        Raises:
            InputError: the folder has a weights file from elsewhere.
        """
        import onnx_ir

        file = self._folder / WEIGHTS_FILE
        if not self._size and file.exists():
            raise InputError(f"{file}: exists already; export to an empty folder")
        with open(file, "ab") as stream:
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _INLINE_BYTES:
                    continue
                offset, length = self._store(stream, tensor.tobytes())
                value.const_value = onnx_ir.ExternalTensor(
                    WEIGHTS_FILE, offset, length, tensor.dtype, shape=tensor.shape, name=name, base_dir=self._folder
                )

    def _store(self, stream: Any, data: bytes) -> tuple[int, int]:
        """Offset and length of `data` in the file, where it is appended unless it is there already."""
        key = hashlib.sha256(data).hexdigest()
        if key not in self._places:
            gap = b"" if self._size else _HEADER
            gap += bytes(-(self._size + len(gap)) % _ALIGNMENT)
            stream.write(gap)
            stream.write(data)
            self._places[key] = (self._size + len(gap), len(data))
            self._size += len(gap) + len(data)
        return self._places[key]
