"""Which C++ compiler to build packages with: one whose code shares the C++ library with torch.

A toolchain without a shared `libstdc++` (some images hold one of their own and name it in `CXX`) puts a second copy of
the library into what it builds. Two copies do not agree about locales, so a package built like that ends the process
as soon as it is opened.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["NO_COMPILER", "sharing_compiler"]

NO_COMPILER = (
    "needs a C++ compiler that links the C++ library dynamically (install g++ or clang++, or name one in the "
    "environment variable CXX)"
)
_NAMES = ("g++", "clang++", "c++")
_PROBE = "#include <string>\nextern \"C\" int probe(int x) { if (x > 0) throw std::string(x, 'a'); return x; }\n"
_SHARED_LIBRARIES = (b"libstdc++.so", b"libc++.so", b"libc++.1.dylib")
_PROBE_LIMIT_S = 60


def sharing_compiler() -> str | None:
    """Path of the first suitable compiler: `CXX`, then the usual names on `PATH`; None where there is none."""
    return _first_suitable(os.environ.get("CXX"), os.environ.get("PATH"))


@functools.lru_cache(maxsize=8)
def _first_suitable(named: str | None, search: str | None) -> str | None:
    found = [shutil.which(name, path=search) for name in (named, *_NAMES) if name]
    return next((path for path in dict.fromkeys(found) if path is not None and _shares_library(path)), None)


def _shares_library(compiler: str) -> bool:
    """Whether a library made by `compiler` names a shared C++ library among those that it needs."""
    with tempfile.TemporaryDirectory(prefix="hybridiff-probe-") as folder:
        source, library = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text(_PROBE)
        command = [compiler, "-shared", "-fPIC", str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_PROBE_LIMIT_S)
            content = library.read_bytes()
        except (OSError, subprocess.SubprocessError):
            return False
    return any(name in content for name in _SHARED_LIBRARIES)
