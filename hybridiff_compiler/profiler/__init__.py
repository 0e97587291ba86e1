"""Profiling: layer and stage times, discrepancy curves, and what each cheaper way to run a step does to the image."""

from .generate import Generation
from .session import ProfileSession, Progress

__all__ = ["Generation", "ProfileSession", "Progress"]
