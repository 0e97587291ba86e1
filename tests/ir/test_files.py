"""Files are replaced whole; devices, pipes and links stay what they are."""

import os
import threading
from pathlib import Path

import pytest

from hybridiff_compiler.ir import InputError, is_special, parse_json, write_atomically, write_text_atomically


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    """As /dev/null and /dev/stdout must: a rename would put a plain file in their place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert is_special(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text_atomically(pipe, "plan\n")
    reader.join(timeout=10)
    assert read == ["plan\n"]
    assert is_special(pipe)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_full_device_is_one_sentence(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.symlink_to("/dev/full")  # a link, so that a regression replaces no device of this machine
    with pytest.raises(InputError, match="full: cannot be written: No space left on device"):
        write_text_atomically(full, "plan\n")
    assert is_special("/dev/full")


def test_what_a_link_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    file, link = tmp_path / "real" / "plan.json", tmp_path / "latest.json"
    file.write_text("old")
    link.symlink_to(file)
    write_text_atomically(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert [path.name for path in file.parent.iterdir()] == ["plan.json"]


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_text("old")

    def fails(at: Path) -> None:
        assert at.suffix == ".png"
        at.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"image\.png: cannot be written: No space left"):
        write_atomically(file, fails)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


@pytest.mark.parametrize("text", ["[" * 200_000, '{"kind": "plan", "x": ' + "9" * 5000 + "}", "\ufeff{}"])
def test_json_that_cannot_be_parsed_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match=r"plan\.json: not valid JSON .*; the plan is truncated or damaged"):
        parse_json(text, source="plan.json", noun="plan")
