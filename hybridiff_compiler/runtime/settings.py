"""Process-wide settings of torch that change numbers: every rank runs with the driver's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["NumericSettings"]


@dataclass(frozen=True)
class NumericSettings:
    """What the result of an operation depends on besides its inputs."""

    threads: int
    """CPU threads of one operation; reductions are split among them."""
    matmul_precision: str
    deterministic: bool
    mkldnn: bool
    allow_tf32_conv: bool

    @classmethod
    def current(cls) -> NumericSettings:
        """Those of this process now."""
        return cls(
            threads=torch.get_num_threads(),
            matmul_precision=torch.get_float32_matmul_precision(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            mkldnn=bool(torch.backends.mkldnn.enabled),
            allow_tf32_conv=torch.backends.cudnn.allow_tf32,
        )

    def apply(self) -> None:
        """Make them those of this process.

        What is so already is left alone: torch tells a default from the same value set by hand, and a compiler's
        cache would not know graphs again.
        """
        current = NumericSettings.current()
        if current.threads != self.threads:
            torch.set_num_threads(self.threads)
        if current.matmul_precision != self.matmul_precision:
            torch.set_float32_matmul_precision(self.matmul_precision)
        if current.deterministic != self.deterministic:
            torch.use_deterministic_algorithms(self.deterministic)
        if current.mkldnn != self.mkldnn:
            torch.backends.mkldnn.enabled = self.mkldnn  # type: ignore[assignment]
        if current.allow_tf32_conv != self.allow_tf32_conv:
            torch.backends.cudnn.allow_tf32 = self.allow_tf32_conv

    def to_json(self) -> dict[str, Any]:
        """Field values by name."""
        return asdict(self)
