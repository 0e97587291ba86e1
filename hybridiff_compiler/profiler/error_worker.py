"""A process that measures parts of the errors: `python -m hybridiff_compiler.profiler.error_worker`.

Started by `error_helpers.ErrorHelpers` and nobody else; it lives as long as its standard input.
"""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch

from ..runtime.processes import read_frame, write_frame
from .errors import ErrorMeasurement
from .partial import Partial

__all__ = ["main"]

_STDIN = 0


def main() -> None:
    """Take the pipeline and the tables, then do one task after the other until the input ends."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever is printed must not end up among the answers
    try:
        threads, arguments = pickle.loads(read_frame(_STDIN))  # noqa: S301 - from our own parent
        torch.set_num_threads(threads)
        _make_known(arguments["generation"].pipe)
        measurement = ErrorMeasurement(**arguments, partial=Partial(None, {}))
        while True:
            what, task, context = pickle.loads(read_frame(_STDIN))  # noqa: S301
            result = getattr(measurement, what)(task, context)
            write_frame(answers, pickle.dumps(result))
    except (EOFError, BrokenPipeError):
        return


def _make_known(pipe: Any) -> None:
    """Build a model of every class that transformers made.

    Which outputs a class records is noted when a model of it is built, once per process, and unpickling builds none.
    """
    from transformers import PreTrainedModel

    with torch.device("meta"):
        for part in pipe.components.values():
            if isinstance(part, PreTrainedModel):
                type(part)(part.config)


if __name__ == "__main__":
    main()
