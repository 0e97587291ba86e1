"""Who a denoiser is, told in milliseconds: what decides the graph that capturing it would give.

A bundle is loaded without capturing the denoiser again, so its graph is not seen. It is a function of the model's
classes and their source code, the configuration, the settings of every submodule, and the names, shapes and dtypes of
the tensors. All of those are recorded when the bundle is compiled and compared when it is loaded. Values of weights,
devices and training flags do not count.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from ..ir import Data, PlanMismatchError
from ..ir.versions import installed_versions

__all__ = ["ModelIdentity"]

_NOT_SETTINGS = {"training", "forward", "gradient_checkpointing"}
"""Attributes of modules that change nothing about the captured graph."""
_COVERED_BY_VERSION = ("torch", "builtins")
"""Packages whose sources need not be read: a bundle names their versions already."""
_MAX_DEPTH = 4
"""Levels of settings inside settings that are looked at."""


class ModelIdentity(Data):
    """What makes a denoiser the one that was compiled."""

    denoiser: str = Field(min_length=1)
    """Class, with its module."""
    config: dict[str, str]
    """Configuration values as text, by key; empty for a class that has none."""
    tensors: int = Field(ge=0)
    """Number of parameters and buffers."""
    tensors_sha256: str
    """Over their names, shapes and dtypes."""
    settings_sha256: str
    """Over class and plain attributes of every submodule, by module path."""
    sources: dict[str, str]
    """sha256 of the source file of every Python module that the denoiser's classes come from, by module name."""
    packages: dict[str, str]
    """Versions of the packages that those modules belong to; for messages only."""

    @classmethod
    def of(cls, denoiser: nn.Module) -> Self:
        """The identity of `denoiser` as it is now."""
        tensors = [
            f"{name} {tensor.dtype} {tuple(tensor.shape)}"
            for named in (denoiser.named_parameters, denoiser.named_buffers)
            for name, tensor in named(remove_duplicate=False)
        ]
        classes: set[type] = set()
        settings = [f"{path} {_describe_object(module, classes, 0)}" for path, module in denoiser.named_modules()]
        sources = _sources(classes)
        return cls(
            denoiser=_qualified(type(denoiser)), config=_config(denoiser), tensors=len(tensors),
            tensors_sha256=_digest(tensors), settings_sha256=_digest(settings), sources=sources,
            packages=_packages(tuple(sorted({name.partition(".")[0] for name in sources}))),
        )

    def check(self, denoiser: nn.Module) -> None:
        """Refuse a denoiser whose graph may be another one.

        Raises:
            PlanMismatchError: says what differs and what to do.
        """
        here = type(self).of(denoiser)
        if here.denoiser != self.denoiser:
            raise PlanMismatchError(
                f"the bundle was compiled for a {self.denoiser}, this pipeline has a {here.denoiser}; load the model "
                "that it was compiled for, or profile this model, plan and compile again"
            )
        keys = [key for key in sorted({*self.config, *here.config}) if self.config.get(key) != here.config.get(key)]
        if keys:
            mine, theirs = here.config.get(keys[0], "absent"), self.config.get(keys[0], "absent")
            raise PlanMismatchError(
                f"the bundle was compiled for a denoiser with {keys[0]} = {theirs}, this one has {mine}"
                + (f" ({len(keys) - 1} more values differ)" if len(keys) > 1 else "")
                + "; load the model that it was compiled for, or profile this model, plan and compile again"
            )
        if here.tensors_sha256 != self.tensors_sha256:
            raise PlanMismatchError(
                f"the bundle was compiled for a denoiser of {self.tensors} parameters and buffers, this one has "
                f"{here.tensors} with other names, shapes or dtypes; fuse or unload adapters such as LoRA and use the "
                "plan's dtype, or profile this model, plan and compile again"
            )
        if here.settings_sha256 != self.settings_sha256:
            raise PlanMismatchError(
                "modules of the denoiser or their settings (attention processors, fused projections, FreeU and the "
                "like) are not what they were when the bundle was compiled; restore them, or compile the bundle again"
            )
        changed = [name for name in sorted({*self.sources, *here.sources})
                   if self.sources.get(name) != here.sources.get(name)]
        if changed:
            raise PlanMismatchError(
                f"the code of {', '.join(changed[:3])} is not what it was when the bundle was compiled (with "
                f"{_versions(self.packages)}; here is {_versions(here.packages)}); install the same versions, or "
                "compile the bundle again"
            )


def _config(denoiser: nn.Module) -> dict[str, str]:
    """What the model was built from; keys with an underscore tell where it was loaded from."""
    config = getattr(denoiser, "config", None)
    if not isinstance(config, Mapping):
        return {}
    return {str(key): _describe(value, set(), 0) for key, value in config.items() if not str(key).startswith("_")}


def _describe_object(thing: object, classes: set[type], depth: int) -> str:
    """Class and settings of an object; its classes are added to `classes`."""
    classes.update(type(thing).__mro__)
    attributes = [
        f"{name}={_describe(value, classes, depth + 1)}" for name, value in sorted(_attributes(thing).items())
        if _is_setting(name, value) and depth < _MAX_DEPTH
    ]
    return f"{_qualified(type(thing))}({', '.join(attributes)})"


def _is_setting(name: str, value: Any) -> bool:
    """Whether an attribute counts; a configuration is compared by itself, and None is as good as absent."""
    if name.startswith("_") or name in _NOT_SETTINGS or value is None:
        return False
    return not (name == "config" and isinstance(value, Mapping))


def _attributes(thing: object) -> dict[str, Any]:
    values: dict[str, Any] = getattr(thing, "__dict__", {})
    return values


def _describe(value: Any, classes: set[type], depth: int) -> str:
    """Text that is the same in every process for an equal setting."""
    if depth > _MAX_DEPTH:
        return "..."
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        return repr(value)
    if isinstance(value, Tensor):
        return f"tensor {value.dtype} {tuple(value.shape)}"
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, Mapping):
        entries = (f"{key!r}: {_describe(item, classes, depth + 1)}" for key, item in value.items())
        return f"{{{', '.join(sorted(entries))}}}"
    if isinstance(value, (list, tuple)):  # a configuration read from JSON has lists for tuples
        return f"[{', '.join(_describe(item, classes, depth + 1) for item in value)}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_describe(item, classes, depth + 1) for item in value))}}}"
    if isinstance(value, type):
        classes.update(value.__mro__)
        return _qualified(value)
    if isinstance(value, nn.Module):
        return type(value).__name__  # described at its own path
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return _describe_object(value, classes, depth)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _sources(classes: set[type]) -> dict[str, str]:
    names = {cls.__module__ for cls in classes}
    return {
        name: _file_digest(file) for name in sorted(names)
        if name.partition(".")[0] not in _COVERED_BY_VERSION and (file := _file(name)) is not None
    }


def _file(module: str) -> str | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    return file if file is not None and file.endswith(".py") and Path(file).is_file() else None


@functools.lru_cache(maxsize=256)
def _file_digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@functools.lru_cache(maxsize=16)
def _packages(names: tuple[str, ...]) -> dict[str, str]:
    return {name: version for name, version in installed_versions(*names).items() if name != "python"}


def _versions(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items()) or "packages of unknown version"


def _digest(lines: list[str] | Iterator[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
