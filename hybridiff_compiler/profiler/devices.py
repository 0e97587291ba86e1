"""Peak figures of GPUs, from their vendor's data sheets; for estimates on hardware that is not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..ir import InputError, UsageError

__all__ = ["DEVICES", "Device", "find_device", "recognise"]

_HALF = ("float16", "bfloat16")
_MAKERS = ("nvidia", "geforce", "tesla")


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
    called: str
    """What drivers call it, less the maker's and the series' names."""
    bfloat16: bool = True
    """Whether its tensor cores compute in bf16."""

    def flops(self, dtype: str) -> float:
        """Peak arithmetic in `dtype`, operations per second.

        Raises:
            InputError: the device has no fast arithmetic in it, or its rate is not known.
        """
        known = [*_HALF[: 1 + self.bfloat16], "float32"]
        if dtype not in known:
            raise InputError(
                f"no peak arithmetic of {self.name} in {dtype}; it is known in {', '.join(known)}, load the model in "
                "one of these"
            )
        return self.single_flops if dtype == "float32" else self.half_flops


def _device(
    name: str, called: str, half: float, single: float, memory: float, link: float, latency: float, *,
    bfloat16: bool = True,
) -> Device:
    """TFLOPS, TFLOPS, GB/s, GB/s, microseconds."""
    return Device(
        name=name, half_flops=half * 1e12, single_flops=single * 1e12, memory_bytes_per_s=memory * 1e9,
        link_bytes_per_s=link * 1e9, link_latency_s=latency * 1e-6, called=called, bfloat16=bfloat16,
    )


DEVICES: Mapping[str, Device] = {
    # NVIDIA H100 data sheet, SXM5: 989 TFLOPS dense, 67, HBM3 3.35 TB/s, NVLink 900 GB/s both directions together.
    "h100": _device("NVIDIA H100 SXM", "h100 80gb hbm3", 989.4, 66.9, 3352, 450, 12),
    # NVIDIA H100 data sheet, PCIe: 756 TFLOPS dense, 51, HBM2e 2.0 TB/s, PCIe 5.0 x16.
    "h100-pcie": _device("NVIDIA H100 PCIe", "h100 pcie", 756, 51.2, 2039, 63, 20),
    # NVIDIA H200 data sheet, SXM: arithmetic as the H100, HBM3e 4.8 TB/s.
    "h200": _device("NVIDIA H200", "h200", 989.4, 66.9, 4800, 450, 12),
    # NVIDIA A100 data sheet, SXM4 80 GB: 312, 19.5, HBM2e 2.04 TB/s, NVLink 600 GB/s both directions together.
    "a100": _device("NVIDIA A100 SXM 80GB", "a100 sxm4 80gb", 312, 19.5, 2039, 300, 14),
    # NVIDIA L40S data sheet: 362 dense, 91.6, GDDR6 864 GB/s, PCIe 4.0 x16.
    "l40s": _device("NVIDIA L40S", "l40s", 362, 91.6, 864, 31.5, 20),
    # NVIDIA Ada GPU architecture white paper: 165.2 dense with fp32 accumulation, 82.6, 1008 GB/s; PCIe 4.0 x16, no
    # peer access.
    "rtx4090": _device("NVIDIA GeForce RTX 4090", "rtx 4090", 165.2, 82.6, 1008, 31.5, 30),
    # NVIDIA Ampere GA102 white paper: 71 dense with fp32 accumulation, 35.6, 936 GB/s; PCIe 4.0 x16.
    "rtx3090": _device("NVIDIA GeForce RTX 3090", "rtx 3090", 71, 35.6, 936, 31.5, 30),
    # The same on PCIe 3.0 x16, as in the paper that METHOD starts from.
    "rtx3090-pcie3": _device("NVIDIA GeForce RTX 3090", "rtx 3090", 71, 35.6, 936, 15.75, 30),
    # NVIDIA Ampere GA102 white paper: A6000, 155 dense, 38.7, 768 GB/s; PCIe 4.0 x16.
    "a6000": _device("NVIDIA RTX A6000", "rtx a6000", 154.8, 38.7, 768, 31.5, 20),
    # NVIDIA Turing data sheet: T4, 65, 8.1, 320 GB/s; PCIe 3.0 x16. Tensor cores know bf16 from Ampere on.
    "t4": _device("Tesla T4", "t4", 65, 8.1, 320, 15.75, 30, bfloat16=False),
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
    """The device that a driver calls so, e.g. `NVIDIA H100 80GB HBM3`; None for all others, also relatives with other
    peaks (`H100 NVL`, `GH200`, `A100-SXM4-40GB`, `RTX 3090 Ti`)."""
    words = vendor_name.lower().replace("-", " ").split()
    called = " ".join(word for word in words if word not in _MAKERS)
    return next((device for device in DEVICES.values() if device.called == called), None)
