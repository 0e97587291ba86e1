"""The exceptions of the package.

Every message says what was got, what is allowed and what to change; the command line prints it as one line and exits
with code 1 (`HybridiffError`) or 2 (`UsageError`).
"""

__all__ = ["HybridiffError", "InputError", "PlanMismatchError", "TargetError", "UsageError", "WorkerError"]


class HybridiffError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(HybridiffError, ValueError):
    """An input (file, argument, plan, profile) is not usable as given."""


class UsageError(InputError):
    """A command or function was called in a way that can never work (exit code 2)."""


class PlanMismatchError(InputError):
    """A plan or profile belongs to another model, shape, dtype or set of devices than the one at hand."""


class TargetError(InputError):
    """No schedule reaches the requested target; the message names the nearest one that can be reached."""


class WorkerError(HybridiffError, RuntimeError):
    """A worker process died, hung or failed; the message carries its rank and traceback."""
