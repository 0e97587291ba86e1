"""Measured profiles that come with the package.

In a source checkout they are `profiles/<machine kind>/<model>.json` in the project's root; in an installed package the
same folder lies inside the package (setup.py maps it there), so there is one copy in either case.
"""

from __future__ import annotations

from pathlib import Path

from ..ir import InputError

__all__ = ["profiles_root", "shipped_profile"]


def profiles_root() -> Path:
    """The folder with one subfolder per machine kind.

    Raises:
        InputError: the installation is incomplete.
    """
    package = Path(__file__).resolve().parent.parent
    candidates = (package / "profiles", package.parent / "profiles")
    for folder in candidates:
        if folder.is_dir() and any(folder.glob("*/*.json")):
            return folder
    raise InputError(
        "no measured profiles come with this installation; measure with --reprofile, or install the package again"
    )


def shipped_profile(model: str, kind: str = "cpu") -> Path:
    """The profile of the bundled model `model` on machines of `kind`.

    Raises:
        InputError: there is none.
    """
    file = profiles_root() / kind / f"{model}.json"
    if not file.is_file():
        raise InputError(f"no measured profile of {model!r} on {kind} machines comes with this installation; measure "
                         "with --reprofile")
    return file
