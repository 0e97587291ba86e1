"""Process-wide settings of torch that change numbers: every rank runs with the driver's."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

__all__ = ["NumericSettings"]

_T = TypeVar("_T")
_PRECISIONS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
"""Places in `torch.backends` with an `fp32_precision`, torch's newer interface for what the older flags say."""


@dataclass(frozen=True)
class NumericSettings:
    """What the result of an operation depends on besides its inputs."""

    threads: int
    """CPU threads of one operation; reductions are split among them."""
    matmul_precision: str | None
    """None: set by the newer interface, after which torch does not answer for the older one."""
    deterministic: bool
    deterministic_warns: bool
    """Whether operations that are not deterministic only warn."""
    mkldnn: bool
    allow_tf32_conv: bool | None
    """None: as `matmul_precision`."""
    precisions: Mapping[str, str]
    """By place, where the newer interface was used; else empty."""
    default_dtype: str
    """Of constants that a forward makes from Python numbers."""

    @classmethod
    def current(cls) -> NumericSettings:
        """Those of this process now."""
        matmul_precision = _answer(torch.get_float32_matmul_precision)
        allow_tf32_conv = _answer(lambda: bool(torch.backends.cudnn.allow_tf32))
        newer = matmul_precision is None or allow_tf32_conv is None
        return cls(
            threads=torch.get_num_threads(),
            matmul_precision=matmul_precision,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            deterministic_warns=torch.is_deterministic_algorithms_warn_only_enabled(),
            mkldnn=bool(torch.backends.mkldnn.enabled),
            allow_tf32_conv=allow_tf32_conv,
            precisions={name: _place(name).fp32_precision for name in _PRECISIONS} if newer else {},
            default_dtype=str(torch.get_default_dtype()).removeprefix("torch."),
        )

    def apply(self) -> None:
        """Make them those of this process.

        What is so already is left alone: torch tells a default from the same value set by hand, and a compiler's
        cache would not know graphs again.
        """
        current = NumericSettings.current()
        if current.threads != self.threads:
            torch.set_num_threads(self.threads)
        if self.matmul_precision is not None and current.matmul_precision != self.matmul_precision:
            torch.set_float32_matmul_precision(self.matmul_precision)
        if (current.deterministic, current.deterministic_warns) != (self.deterministic, self.deterministic_warns):
            torch.use_deterministic_algorithms(self.deterministic, warn_only=self.deterministic_warns)
        if current.mkldnn != self.mkldnn:
            torch.backends.mkldnn.enabled = self.mkldnn  # type: ignore[assignment]
        if self.allow_tf32_conv is not None and current.allow_tf32_conv != self.allow_tf32_conv:
            torch.backends.cudnn.allow_tf32 = self.allow_tf32_conv
        for name, precision in self.precisions.items():
            if _place(name).fp32_precision != precision:
                _place(name).fp32_precision = precision
        if current.default_dtype != self.default_dtype:
            torch.set_default_dtype(getattr(torch, self.default_dtype))

    def to_json(self) -> dict[str, Any]:
        """Field values by name."""
        return asdict(self)


def _answer(ask: Callable[[], _T]) -> _T | None:
    """What torch says; None where it refuses to, as the newer interface was used."""
    try:
        return ask()
    except RuntimeError:
        return None


def _place(name: str) -> Any:
    return operator.attrgetter(name)(torch.backends)
