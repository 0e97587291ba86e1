"""Where compiled packages are unpacked, and that nothing of them is left behind.

The loader unpacks to a folder that it removes when it is destroyed. Workers end without destroying anything, or are
killed, so every process unpacks into a folder with its number in the name, which whoever started it removes.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["remove_unpacked", "unpacking"]

_PREFIX = "hybridiff-unpacked-"
_VARIABLE = "TMPDIR"
"""The first one that the loader looks at."""
_folders: dict[int, str] = {}


@contextmanager
def unpacking() -> Iterator[None]:
    """While open, loaders unpack into this process's folder."""
    folder, before = _own_folder(), os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


def remove_unpacked(process: int) -> None:
    """Remove what a process has unpacked; it must have ended, or must load nothing any more."""
    # A variable that was set after this process first looked holds for its children only.
    for place in {tempfile.gettempdir(), os.environ.get(_VARIABLE, tempfile.gettempdir())}:
        for folder in Path(place).glob(f"{_PREFIX}{process}-*"):
            shutil.rmtree(folder, ignore_errors=True)


def _own_folder() -> str:
    own = os.getpid()
    if own not in _folders or not os.path.isdir(_folders[own]):
        _folders[own] = tempfile.mkdtemp(prefix=f"{_PREFIX}{own}-")
        atexit.register(_remove_own, own)
    return _folders[own]


def _remove_own(owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(_folders.pop(owner), ignore_errors=True)
