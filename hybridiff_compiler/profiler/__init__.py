"""Profiling: layer and stage times, discrepancy curves, and what each cheaper way to run a step does to the image."""

from .errors import ErrorSettings
from .generate import Generation
from .session import ProfileSession, Progress

__all__ = ["ErrorSettings", "Generation", "ProfileSession", "Progress"]
