"""Peak figures of GPUs, from their vendor's data sheets; for estimates on hardware that is not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..ir import UsageError

__all__ = ["DEVICES", "Device", "find_device", "recognise"]

_HALF = ("float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of GPU. Arithmetic is dense (no structured sparsity) and accumulates in fp32."""

    name: str
    half_flops: float
    """fp16 and bf16 matrix arithmetic, operations per second."""
    single_flops: float
    """fp32 arithmetic outside the tensor cores, operations per second."""
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """One direction to another GPU of the host, nominal."""
    link_latency_s: float
    """A guess at the time of a small message; no data sheet has it."""

    def flops(self, dtype: str) -> float:
        """Peak arithmetic in `dtype`, operations per second."""
        return self.half_flops if dtype in _HALF else self.single_flops


def _device(name: str, half: float, single: float, memory: float, link: float, latency: float) -> Device:
    """TFLOPS, TFLOPS, GB/s, GB/s, microseconds."""
    return Device(
        name=name, half_flops=half * 1e12, single_flops=single * 1e12, memory_bytes_per_s=memory * 1e9,
        link_bytes_per_s=link * 1e9, link_latency_s=latency * 1e-6,
    )


DEVICES: Mapping[str, Device] = {
    # NVIDIA H100 data sheet, SXM5: 989 TFLOPS dense, 67, HBM3 3.35 TB/s, NVLink 900 GB/s both directions together.
    "h100": _device("NVIDIA H100 SXM", 989.4, 66.9, 3352, 450, 12),
    # NVIDIA H100 data sheet, PCIe: 756 TFLOPS dense, 51, HBM2e 2.0 TB/s, PCIe 5.0 x16.
    "h100-pcie": _device("NVIDIA H100 PCIe", 756, 51.2, 2039, 63, 20),
    # NVIDIA H200 data sheet, SXM: arithmetic as the H100, HBM3e 4.8 TB/s.
    "h200": _device("NVIDIA H200", 989.4, 66.9, 4800, 450, 12),
    # NVIDIA A100 data sheet, SXM4 80 GB: 312, 19.5, HBM2e 2.04 TB/s, NVLink 600 GB/s both directions together.
    "a100": _device("NVIDIA A100 SXM 80GB", 312, 19.5, 2039, 300, 14),
    # NVIDIA L40S data sheet: 362 dense, 91.6, GDDR6 864 GB/s, PCIe 4.0 x16.
    "l40s": _device("NVIDIA L40S", 362, 91.6, 864, 31.5, 20),
    # NVIDIA Ada GPU architecture white paper: 165.2 dense with fp32 accumulation, 82.6, 1008 GB/s; PCIe 4.0 x16, no
    # peer access.
    "rtx4090": _device("NVIDIA GeForce RTX 4090", 165.2, 82.6, 1008, 31.5, 30),
    # NVIDIA Ampere GA102 white paper: 71 dense with fp32 accumulation, 35.6, 936 GB/s; PCIe 4.0 x16.
    "rtx3090": _device("NVIDIA GeForce RTX 3090", 71, 35.6, 936, 31.5, 30),
    # The same on PCIe 3.0 x16, as in the paper that METHOD starts from.
    "rtx3090-pcie3": _device("NVIDIA GeForce RTX 3090", 71, 35.6, 936, 15.75, 30),
    # NVIDIA Ampere GA102 white paper: A6000, 155 dense, 38.7, 768 GB/s; PCIe 4.0 x16.
    "a6000": _device("NVIDIA RTX A6000", 154.8, 38.7, 768, 31.5, 20),
    # NVIDIA Turing data sheet: T4, 65, 8.1, 320 GB/s; PCIe 3.0 x16.
    "t4": _device("Tesla T4", 65, 8.1, 320, 15.75, 30),
}
"""By the name that `--estimate` takes."""


def find_device(name: str) -> Device:
    """The device called `name`.

    Raises:
        UsageError: there is none; the message lists them.
    """
    if name.lower() not in DEVICES:
        raise UsageError(f"no peak figures of {name!r}; estimates can be made for {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


def recognise(vendor_name: str) -> Device | None:
    """The device that a driver calls so, e.g. `NVIDIA H100 80GB HBM3`; the longest name that fits."""
    words = vendor_name.lower().replace("-", " ").split()
    fits = [
        (len(key), device) for key, device in DEVICES.items()
        if all(part in "".join(words) for part in key.removesuffix("-pcie3").split("-")) and "pcie3" not in key
    ]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None
