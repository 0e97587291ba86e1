"""Where words go: literal text, tables that stay readable, streams that cannot take everything."""

import io
import os
import subprocess
import sys

import pytest
from rich.table import Table

from hybridiff_compiler.cli.output import Output
from hybridiff_compiler.report import plain_table


class Terminal(io.StringIO):
    def isatty(self):
        return True


def table():
    made = plain_table("[red]title", "prompt", *[f"number {index}" for index in range(9)])
    made.add_row("a [bold]cat[/nope] :cat:", *["0.123456"] * 9)
    return made


def test_brackets_and_colons_are_printed_as_they_are():
    """Prompts and paths hold them; as markup they vanish or, unbalanced, end the command."""
    stream = io.StringIO()
    Output(False, stream).result(table(), "wrote [dim]x.png :cat:", machine=dict)
    for text in ("[red]title", "a [bold]cat[/nope] :cat:", "wrote [dim]x.png :cat:"):
        assert text in stream.getvalue()


def test_numbers_are_not_folded_in_narrow_terminals(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    Output(False, stream).result(table(), "words " * 20, machine=dict)
    assert stream.getvalue().count("0.123456") == 9
    assert isinstance(table(), Table)
    assert max(len(line) for line in stream.getvalue().splitlines() if line.startswith("words")) <= 60


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_that_lacks_characters(files, encoding):
    done = subprocess.run(
        [sys.executable, "-m", "hybridiff_compiler", "show", files / "exact.json"], capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding}, timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"rank 1 ?" in done.stdout


def test_a_full_device_and_closed_streams(files):
    def run(redirection):
        command = f"{sys.executable} -m hybridiff_compiler show {files / 'exact.json'} {redirection}"
        return subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)

    full = run("> /dev/full")
    assert full.returncode == 1
    assert full.stderr.startswith("error: No space left on device: ")
    assert len(full.stderr.splitlines()) == 1
    closed = run(">&- 2>&-")
    assert closed.returncode == 0
