"""The command line; `main` is the console script.

Nothing heavy is imported here or at the top of a command's file, so that `hybridiff --help` answers at once.
"""

from .entry import main

__all__ = ["main"]
