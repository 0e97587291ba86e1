"""Capture: denoiser -> layer graph, and extraction of stage graphs from it.

Entry points: `capture`, `flatten_call`, `CapturedDenoiser.extract`.
"""

from .call import CallSignature, LeafSpec, flatten_call
from .graph import CapturedDenoiser, capture
from .stage import StageGraph

__all__ = ["CallSignature", "CapturedDenoiser", "LeafSpec", "StageGraph", "capture", "flatten_call"]
