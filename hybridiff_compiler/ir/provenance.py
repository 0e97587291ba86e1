"""Which denoiser a document is about, and where its measurements come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .data import Data
from .signature import CallSignature

__all__ = ["ModelInfo", "Provenance"]


class ModelInfo(Data):
    """Which denoiser a profile or plan belongs to."""

    name: str
    """As the user named it; for display."""
    denoiser: str
    """Class name of the denoiser."""
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    """`LayerGraph.fingerprint` at the branch batch size: layers, values and shapes."""
    parameter_bytes: int = Field(ge=0)
    dtype: str
    signature: CallSignature
    """One branch's call (batch of one image)."""


class Provenance(Data):
    """Where measurements come from."""

    created: str
    """UTC, ISO 8601."""
    device: str
    """Device name as the vendor reports it, or the CPU model."""
    device_type: Literal["cpu", "cuda"] = "cpu"
    backend: str
    threads: int | None = None
    """CPU threads per rank; null on GPUs."""
    versions: dict[str, str]
    seed: int
    prompts: int
    prompts_sha256: str
    random_weights: bool = False
    """True when latency only is meaningful."""
    estimated: str | None = None
    """Null for measurements; otherwise how the times were estimated for `device`, which was not at hand."""
    clocks_mhz: dict[str, int] = Field(default={})
    """Clocks of the device by domain (`sm`, `sm_max`, `memory`), where its driver tells."""
