"""Output files: refused before the work starts when they cannot be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..ir import InputError, UsageError, is_special

__all__ = ["check_folder", "check_image_path", "check_writable"]

_IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def check_writable(file: Path | None) -> None:
    """Refuse an output path that cannot be written (None is fine).

    Raises:
        InputError: the folder does not exist or cannot be written, or the path is a folder.
    """
    if file is None:
        return
    if file.is_dir():
        raise InputError(f"{file}: is a folder; give the path of a file to write")
    if is_special(file):
        if not os.access(file, os.W_OK):
            raise InputError(f"{file}: cannot be written; choose another output path")
        return
    folder = Path(os.path.realpath(file)).parent
    if not folder.is_dir():
        raise InputError(f"{file}: the folder {folder} does not exist; make it first or choose another output path")
    _probe(folder, file)


def check_image_path(file: Path) -> None:
    """Refuse an image path whose ending names no known format.

    Raises:
        UsageError: the ending is none of the known ones.
    """
    if file.suffix.lower() not in _IMAGES:
        raise UsageError(f"{file}: the ending names no image format; use one of {', '.join(_IMAGES)}")


def check_folder(folder: Path) -> None:
    """Make an output folder, refusing one that cannot be written.

    Raises:
        InputError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror or error}; choose another --out") from None
    _probe(folder, folder)


def _probe(folder: Path, named: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{named}: cannot be written: {error.strerror or error}; choose another output path") from None
