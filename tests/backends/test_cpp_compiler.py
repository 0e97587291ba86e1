"""Choice of the C++ compiler: one that brings a C++ library of its own must not be taken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hybridiff_compiler.backends.aotinductor import AotInductor
from hybridiff_compiler.backends.cpp_compiler import sharing_compiler

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++; install it")


def _script(path: Path, options: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" {options}\n')
    path.chmod(0o755)
    return path


def test_a_compiler_with_a_library_of_its_own_is_passed_over(tmp_path, monkeypatch):
    static = _script(tmp_path / "own" / "g++", "-static-libstdc++")
    shared = _script(tmp_path / "usual" / "c++", "")
    broken = _script(tmp_path / "broken" / "g++", "-no-such-option")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("as", "ld"):
        (tools / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("CXX", str(static))
    monkeypatch.setenv("PATH", f"{broken.parent}:{shared.parent}:{tools}")
    assert sharing_compiler() == str(shared)
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    assert sharing_compiler() == str(shared)
    monkeypatch.setenv("CXX", str(shared))
    monkeypatch.setenv("PATH", f"{static.parent}:{tools}")
    assert sharing_compiler() == str(shared)
    monkeypatch.delenv("CXX")
    assert sharing_compiler() is None
    assert "links the C++ library dynamically" in str(AotInductor().missing())
