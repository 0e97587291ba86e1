"""Files of a bundle: hashed, and opened only when they are plain files in the bundle's own folder."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from ..ir import InputError
from .manifest import FileRecord

__all__ = ["check_file", "read_text", "record_file"]

_CHUNK = 1 << 20


def record_file(file: Path) -> FileRecord:
    """Name, size and hash of a file."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(file=file.name, sha256=digest, size=file.stat().st_size)


def check_file(folder: Path, record: FileRecord) -> Path:
    """The path of a recorded file, once its content has been found to be the recorded one.

    Raises:
        InputError: it is missing, no plain file, or was changed.
    """
    path = folder / record.file
    descriptor = _open_plain(path)
    try:
        size = os.fstat(descriptor).st_size
        if size != record.size:
            raise InputError(f"{path}: has {size} bytes, the manifest says {record.size}; {_REMEDY}")
        digest = hashlib.sha256()
        while chunk := os.read(descriptor, _CHUNK):
            digest.update(chunk)
    finally:
        os.close(descriptor)
    if digest.hexdigest() != record.sha256:
        raise InputError(
            f"{path}: sha256 is {digest.hexdigest()[:12]}..., the manifest says {record.sha256[:12]}...; {_REMEDY}"
        )
    return path


def read_text(path: Path) -> str:
    """The content of a plain UTF-8 file.

    Raises:
        InputError: it is missing, no plain file, or not UTF-8.
    """
    descriptor = _open_plain(path)
    with os.fdopen(descriptor, "rb") as stream:
        data = stream.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is damaged ({error.reason} at byte {error.start}); {_REMEDY}") from None


def _open_plain(path: Path) -> int:
    """Open a regular file that is no link; others (a pipe, a device) are not even opened."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise InputError(f"{path}: is a link or no plain file; {_REMEDY}")
        return os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise InputError(f"{path}: is missing from the bundle; {_REMEDY}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; {_REMEDY}") from None


_REMEDY = "copy the bundle again or make it anew with `hybridiff compile`"
