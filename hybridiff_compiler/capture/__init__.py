"""Capture: denoiser -> layer graph, and extraction of stage graphs from it.

Entry points: `capture`, `CapturedDenoiser.extract`, `flatten_call`; `meta_denoiser` and `bind` for capture without
weights.
"""

from .bind import bind
from .call import CallSignature, LeafSpec, flatten_call, step_parameters, unflatten_call
from .graph import CapturedDenoiser, capture
from .meta import meta_denoiser
from .stage import StageGraph

__all__ = [
    "CallSignature",
    "CapturedDenoiser",
    "LeafSpec",
    "StageGraph",
    "bind",
    "capture",
    "flatten_call",
    "meta_denoiser",
    "step_parameters",
    "unflatten_call",
]
