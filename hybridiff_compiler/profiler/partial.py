"""The state of an unfinished profile, kept beside its output so that a stopped session continues where it was.

One safetensors file: tensors are what was measured so far, its header says for which settings. Every finished part
replaces the file in one step, so that stopping at any moment leaves a readable one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ir import InputError, PlanMismatchError, write_atomically

__all__ = ["Partial", "weights_digest"]

_FORMAT = "hybridiff-partial-3"
_SAMPLES = 256
"""Elements of every parameter that `weights_digest` looks at."""


class Partial:
    """Finished parts of a session by name, in a file or (without a path) in memory."""

    def __init__(self, path: Path | None, settings: Mapping[str, str]) -> None:
        """
        Args:
            path: the file; read if it exists.
            settings: everything that decides what is measured; a file of other settings is refused.

        Raises:
            PlanMismatchError: the file is of another session.
            InputError: the file is damaged.
        """
        self.path, self._settings = path, dict(settings)
        self._tensors: dict[str, Tensor] = {}
        self._parts: dict[str, Any] = {}
        self._notes: dict[str, list[float]] = {}
        if path is not None and path.exists():
            self._read(path)
        self.found = len(self._parts)
        """Number of parts that were there already."""

    def get(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Tensors and JSON data of a finished part, None when it is not there."""
        if name not in self._parts:
            return None
        prefix = f"{name}/"
        tensors = {key[len(prefix):]: t for key, t in self._tensors.items() if key.startswith(prefix)}
        return tensors, self._parts[name]

    def put(self, name: str, data: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Keep a finished part: JSON data and tensors."""
        self._parts[name] = data
        for key, tensor in (tensors or {}).items():
            self._tensors[f"{name}/{key}"] = tensor.detach().cpu().contiguous()
        if self.path is not None:
            self._write(self.path)

    def noted(self, name: str) -> list[float]:
        """A list of numbers to which may be added at any time; it is written with the next part that is finished."""
        return self._notes.setdefault(name, [])

    def remove(self) -> None:
        """Delete the file: the session is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                self._tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            if header.get("format") != _FORMAT:
                raise ValueError(f"its format is {header.get('format')!r}, not {_FORMAT!r}")
            settings, self._parts = json.loads(header["settings"]), json.loads(header["parts"])
            self._notes = json.loads(header["notes"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: is no readable state of an unfinished profile ({error}); delete it") from None
        for what in {**settings, **self._settings}:
            if settings.get(what) != self._settings.get(what):
                raise PlanMismatchError(
                    f"{path} is the state of another unfinished profile: its {what} is {settings.get(what)}, this "
                    f"one's is {self._settings.get(what)}; delete it (or pass --restart) to begin anew"
                )

    def _write(self, path: Path) -> None:
        from safetensors.torch import save_file

        header = {"format": _FORMAT} | {
            name: json.dumps(value)
            for name, value in (("settings", self._settings), ("parts", self._parts), ("notes", self._notes))
        }
        write_atomically(
            path, lambda file: save_file(self._tensors or {"empty": torch.zeros(1)}, file, metadata=header)
        )


def weights_digest(module: nn.Module) -> str:
    """sha256 over names, shapes and evenly spaced elements of all parameters: tells trained weights apart, quickly."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        flat = parameter.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // _SAMPLES)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(picked.numpy().tobytes())
    return digest.hexdigest()
