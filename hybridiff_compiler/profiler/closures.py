"""Pickles of what holds functions defined inside functions, as the hooks that libraries put on modules are.

Plain pickles name functions, and these have no name that another process could look up. Here they travel as code, with
what they have closed over.
"""

from __future__ import annotations

import importlib
import io
import marshal
import pickle
import sys
from types import CellType, CodeType, FunctionType
from typing import Any

__all__ = ["pack"]


def pack(obj: Any) -> bytes:
    """A pickle of `obj` for a process of the same Python that can import the same modules; `pickle.loads` reads it.

    Raises:
        PicklingError, TypeError, AttributeError: something in it cannot travel.
    """
    stream = io.BytesIO()
    _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(obj)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, FunctionType) or obj.__module__ == "__main__" or _has_name(obj):
            return NotImplemented
        cells = obj.__closure__ or ()
        made = (marshal.dumps(obj.__code__), obj.__module__, obj.__name__, len(cells))
        # Cells are filled once the function is there, as it may have closed over itself.
        state = (obj.__defaults__, obj.__kwdefaults__, obj.__qualname__, [cell.cell_contents for cell in cells])
        return _function, made, state, None, None, _fill


def _has_name(function: FunctionType) -> bool:
    found: Any = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is function


def _function(code: bytes, module: str, name: str, cells: int) -> FunctionType:
    loaded: CodeType = marshal.loads(code)
    closure = tuple(CellType() for _ in range(cells))
    return FunctionType(loaded, vars(importlib.import_module(module)), name, None, closure)


def _fill(function: FunctionType, state: tuple[Any, Any, str, list[Any]]) -> None:
    function.__defaults__, function.__kwdefaults__, function.__qualname__, contents = state
    for cell, value in zip(function.__closure__ or (), contents):
        cell.cell_contents = value
