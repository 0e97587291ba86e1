"""Which prompts a command works on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..ir import InputError, UsageError

__all__ = ["choose_prompts"]


def choose_prompts(
    texts: Sequence[str] | None, file: Path | None, *, default: Sequence[str], limit: int | None
) -> list[str]:
    """The prompts given one by one and in a file (one a line, empty lines skipped); `default` when neither is given.

    Raises:
        UsageError: there are none at all.
        InputError: the file cannot be read or holds none.
    """
    prompts = [text.strip() for text in texts or ()]
    if any(not prompt for prompt in prompts):
        raise UsageError("got an empty --prompt; describe the image in words")
    if file is not None:
        prompts += _read(file)
    if not prompts:
        prompts = list(default)
    if not prompts:
        raise UsageError("no prompts; give --prompt TEXT (repeatable) or --prompts FILE with one a line")
    return prompts[:limit]


def _read(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; --prompts takes a text file with one prompt a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as text: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{file}: holds no prompts; write one a line")
    return prompts
