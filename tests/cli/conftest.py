import pytest
from quality.fabricated import unet_profile

from hybridiff_compiler.cli.entry import run_command
from hybridiff_compiler.planner import plan


class Ran:
    """Exit code and streams of one command."""

    def __init__(self, code, captured):
        self.code, self.out, self.err = code, captured.out, captured.err

    @property
    def error(self):
        """The one line of a refused command."""
        assert self.out == "", f"a refused command prints nothing on stdout, got {self.out!r}"
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line


@pytest.fixture
def hybridiff(capsys):
    """Runs one command in this process."""

    def run(*arguments):
        capsys.readouterr()
        code = run_command([str(argument) for argument in arguments])
        return Ran(code, capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with a profile, an exact plan and a cheap one for bundled:unet."""
    folder = tmp_path_factory.mktemp("files")
    profile = unet_profile()
    profile.save(folder / "profile.json")
    plan(profile, policy="exact").save(folder / "exact.json")
    plan(profile, speedup=2.5).save(folder / "cheap.json")
    (folder / "profiles").mkdir()
    profile.save(folder / "profiles" / "unet.json")
    return folder
