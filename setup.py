"""Everything is declared in pyproject.toml, but for one thing that TOML cannot say: the measured profiles lie in
`profiles/` at the project's root, and are installed as `hybridiff_compiler/profiles/` without a second copy."""

from pathlib import Path

from setuptools import find_packages, setup

PROFILES = "hybridiff_compiler.profiles"
ROOT = Path(__file__).parent / "profiles"
FOLDERS = [PROFILES, *(f"{PROFILES}.{kind.name}" for kind in sorted(ROOT.glob("*/")))] if ROOT.is_dir() else []

setup(
    packages=[*find_packages(include=["hybridiff_compiler*"]), *FOLDERS],
    package_dir={PROFILES: "profiles"} if FOLDERS else {},
    package_data={"hybridiff_compiler": ["py.typed", "reference_models/**/*"], PROFILES: ["**/*.json"]},
)
