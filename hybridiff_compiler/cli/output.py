"""Where a command's words go: results to stdout, progress and remarks to stderr.

With `--json` stdout carries one JSON object and nothing else, whatever libraries print.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["Output", "ProgressCallback", "as_text", "opened"]

ProgressCallback = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

_PLAIN_WIDTH = 160
"""Columns when stdout is a file or a pipe: tables must not be folded to 80."""


def as_text(human: Iterable[RenderableType]) -> str:
    """What `Output.result` prints, as it is written to a file."""
    buffer = io.StringIO()
    Output(False, buffer).result(*human, machine=dict)
    return buffer.getvalue()


class Output:
    """The two streams of one command."""

    def __init__(self, json_mode: bool, stdout: TextIO) -> None:
        self.json_mode = json_mode
        self._stdout = stdout
        literal: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}  # prompts and paths hold both
        self._results = Console(file=stdout, width=None if stdout.isatty() else _PLAIN_WIDTH, **literal)
        self._remarks = Console(stderr=True, **literal)

    def result(self, *human: RenderableType, machine: Callable[[], Any]) -> None:
        """Print the result: `human` renderables, or with `--json` the object that `machine` returns."""
        if self.json_mode:
            self._stdout.write(json.dumps(machine(), indent=1, allow_nan=False) + "\n")
            self._stdout.flush()
            return
        for part in human:
            self._print(part)

    def _print(self, part: RenderableType) -> None:
        """Tables are as wide as in a file, even where the terminal is narrower: lines that it folds can be read,
        numbers folded within their columns cannot."""
        console, width = self._results, self._results.width
        if isinstance(part, Table):
            console.width = max(width, _PLAIN_WIDTH)
        console.print(part)
        console.width = width

    def remark(self, text: str) -> None:
        """One line on stderr."""
        self._remarks.print(text, soft_wrap=True)

    @contextmanager
    def progress(self, *, one_bar: bool = False) -> Iterator[ProgressCallback]:
        """A callback that draws a bar per stage on stderr, or one bar that shows the present stage; one line per stage
        where stderr is no terminal."""
        if not self._remarks.is_terminal:
            yield _plain_progress(self.remark)
            return
        stage_name = TextColumn("{task.description}", markup=False)
        columns = (stage_name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._remarks, transient=True) as bars:
            tasks: dict[str, TaskID] = {}

            def update(stage: str, done: int, total: int) -> None:
                bar = "" if one_bar else stage
                if bar not in tasks:
                    tasks[bar] = bars.add_task(stage, total=total)
                bars.update(tasks[bar], description=stage, completed=done, total=total)

            yield update


def _plain_progress(remark: Callable[[str], None]) -> ProgressCallback:
    seen: set[str] = set()

    def update(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.add(stage)
            remark(f"{stage} ...")

    return update


@contextmanager
def opened(json_mode: bool) -> Iterator[Output]:
    """The output of a command; stray prints go to stderr while it is open in JSON mode."""
    stdout = sys.stdout
    if not json_mode:
        yield Output(False, stdout)
        return
    with _kept_clean(stdout) as clean:
        yield Output(True, clean)


@contextmanager
def _kept_clean(stdout: TextIO) -> Iterator[TextIO]:
    """Send file descriptor 1 (worker processes inherit it) and `sys.stdout` to stderr; yield the real stdout."""
    sys.stdout = sys.stderr
    try:
        if not _is_descriptor_one(stdout):
            yield stdout
            return
        stdout.flush()
        saved = os.dup(1)
        os.dup2(2, 1)
        try:
            with os.fdopen(os.dup(saved), "w", encoding="utf-8") as real:
                yield real
        finally:
            os.dup2(saved, 1)
            os.close(saved)
    finally:
        sys.stdout = stdout


def _is_descriptor_one(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, ValueError, AttributeError):
        return False
