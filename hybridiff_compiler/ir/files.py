"""Files as the package reads and writes them: never half written, and damage is reported in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import InputError

__all__ = ["is_special", "parse_json", "write_atomically", "write_text_atomically"]


def parse_json(text: str, *, source: str, noun: str) -> Any:
    """The value of a JSON text.

    Args:
        text: what was read.
        source: names it in messages.
        noun: what it should be, e.g. `plan`.

    Raises:
        InputError: it is no JSON, or none that anything could be made of.
    """
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # halves of characters can be escaped but not written
        return value
    except json.JSONDecodeError as error:
        problem = f"at line {error.lineno} column {error.colno} ({error.msg})"
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits; not Unicode
        problem = f"({error})"
    raise InputError(f"{source}: not valid JSON {problem}; the {noun} is truncated or damaged, make it again")


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether the path names a device or pipe, such as /dev/null: there is nothing to rename over, nor beside it."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file of the same ending, then rename it to `path`: readers never see half a file.

    What a symbolic link points to is replaced, not the link. Devices and pipes are written to.

    Raises:
        InputError: the folder does not exist or cannot be written, or is full.
    """
    named = Path(path)
    special = is_special(named)
    file = named if special else Path(os.path.realpath(named))
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(
            prefix=f".{named.stem}.", suffix=named.suffix, dir=None if special else file.parent
        )
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        if special:
            with temporary.open("rb") as source, file.open("wb") as target:
                shutil.copyfileobj(source, target)
        else:
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(file)
    except OSError as error:
        raise InputError(
            f"{named}: cannot be written: {error.strerror or error}; choose another output path"
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return named


def write_text_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """`write_atomically` for UTF-8 text."""
    return write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
