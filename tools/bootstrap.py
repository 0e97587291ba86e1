"""Set up a fresh machine and run the demo or the tests: needs Python 3.11 or newer and pip, nothing else.

    python3 tools/bootstrap.py demo [options of `hybridiff demo`]
    python3 tools/bootstrap.py test [options of pytest]

Makes a virtual environment in `.venv` and installs into it what the command needs. What is installed is reused: a
second run starts at once. `test` also runs ruff and mypy, and fails when any of the three does.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
TORCH = "torch==2.13.0"
"""Pinned and installed first, so that pip takes this version wherever it finds it (a CPU build at hand, for one)."""
SOURCES = ("pyproject.toml", "setup.py", "tools/bootstrap.py")
"""Installed again when one of them changes."""


def main(arguments: list[str]) -> int:
    """Run one of the two commands."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the Python that starts this may be any
        return _refuse(f"this is Python {sys.version.split()[0]}; run it with Python 3.11 or newer")
    if not arguments or arguments[0] not in ("demo", "test"):
        return _refuse("usage: python3 tools/bootstrap.py demo|test [options]")
    command, options = arguments[0], arguments[1:]
    try:
        _install(".[dev]" if command == "test" else ".")
    except subprocess.CalledProcessError as error:
        return _refuse(f"{' '.join(map(str, error.cmd))} failed with exit code {error.returncode}; see above")
    if command == "demo":
        return _call([_bin("hybridiff"), "demo", *options])
    codes = []
    # Two processes at least: most tests use one core. Files stay together, they share what is costly to make.
    side_by_side = ["-n", str(min(max(os.cpu_count() or 1, 2), 4)), "--dist", "loadfile"]
    tests = [_bin("python"), "-m", "pytest", *side_by_side, *options]
    for check in ([_bin("ruff"), "check", "."], [_bin("mypy")], tests):
        print(f"$ {Path(check[0]).name} {' '.join(check[1:])}", flush=True)
        codes.append(_call(check))
    return next((code for code in codes if code), 0)


def _install(requirement: str) -> None:
    """Bring `.venv` up to date for `requirement`, or do nothing when it is."""
    stamp = VENV / f"installed-{hashlib.sha256(requirement.encode()).hexdigest()[:8]}"
    state = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in SOURCES)).hexdigest()
    if stamp.is_file() and stamp.read_text() == state:
        return
    pip = _make_venv()
    _run([*pip, "install", "--quiet", TORCH])
    _run([*pip, "install", "--quiet", "--editable", requirement])
    stamp.write_text(state)


def _make_venv() -> list[str]:
    """Make `.venv` unless it is there; returns the command of a pip that installs into it."""
    python = _bin("python")
    if not Path(python).exists():
        print(
            f"making a virtual environment in {VENV} and installing torch and diffusers (a minute or more)", flush=True
        )
        try:
            _run([sys.executable, "-m", "venv", str(VENV)], quiet=True)
        except subprocess.CalledProcessError:  # systems that package ensurepip apart from Python
            shutil.rmtree(VENV, ignore_errors=True)
            _run([sys.executable, "-m", "venv", "--without-pip", str(VENV)])
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return [python, "-m", "pip"]
    return [sys.executable, "-m", "pip", "--python", python]


def _bin(name: str) -> str:
    folder, ending = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
    return str(VENV / folder / f"{name}{ending}")


def _run(command: list[str], *, quiet: bool = False) -> None:
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL if quiet else None)


def _call(command: list[str]) -> int:
    """Run `command` to its end; Ctrl-C reaches it directly, so it is waited for."""
    process = subprocess.Popen(command, cwd=ROOT)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
