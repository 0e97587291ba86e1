"""The commands and their options are a promise: changing them means changing this file."""

import subprocess
import sys

import typer

from hybridiff_compiler.cli.app import app

SURFACE = {
    "demo": ["--out", "--reprofile", "--profiles", "--prompts", "--models", "--json"],
    "profile": [
        "MODEL", "--output/-o", "--prompt", "--prompts", "--limit", "--steps", "--guidance-scale", "--height",
        "--width", "--seed", "--threads", "--device", "--dtype", "--errors-from", "--cuts-from",
        "--costs-only", "--random-weights", "--gpus", "--link", "--backend", "--jobs", "--max-seconds",
        "--estimate", "--fit", "--quick", "--full", "--trends", "--restart", "--json",
    ],
    "plan": [
        "PROFILE", "--gpus", "--min-psnr", "--speedup", "--max-latency-ms", "--policy", "--quantile", "--adaptive",
        "--steps", "--strength", "--costs", "--without", "--rank-speeds", "--rank-memory", "--weights",
        "--pareto", "--png", "--html", "--objective",
        "--arrival-rate", "--percentile", "--output/-o", "--json",
    ],
    "refine": [
        "PLAN", "PROFILE", "MODEL", "--output/-o", "--tries", "--seconds", "--prompt", "--prompts", "--limit",
        "--guidance-scale", "--height", "--width", "--seed", "--threads", "--json",
    ],
    "compile": ["PLAN", "MODEL", "--output/-o", "--backend", "--target", "--jobs/-j", "--json"],
    "run": [
        "PLAN", "MODEL", "--prompt", "--output/-o", "--steps", "--guidance-scale", "--height", "--width", "--seed",
        "--threads", "--json",
    ],
    "verify": [
        "PLAN", "MODEL", "--prompt", "--prompts", "--limit", "--steps", "--guidance-scale", "--height", "--width",
        "--seed", "--threads", "--repeats", "--simulate", "--min-psnr", "--output/-o", "--json",
    ],
    "bench": [
        "MODEL...", "--random-weights", "--pixels", "--steps", "--gpus", "--row", "--repeats", "--device", "--backend",
        "--threads", "--profile", "--seed", "--decoder", "--decode", "--decode-dtype", "--trace", "--output/-o",
        "--json",
    ],
    "show": ["FILE", "OTHER", "--profile", "--png", "--html", "--trace", "--json"],
}


def test_commands_and_options():
    group = typer.main.get_command(app)
    surface = {
        name: [
            "/".join(p.opts) if p.param_type_name == "option" else p.metavar
            for p in command.params if p.name != "help"
        ]
        for name, command in group.commands.items()
    }
    assert surface == SURFACE


def test_help_loads_nothing_heavy():
    program = (
        "import sys; from hybridiff_compiler.cli.entry import run_command; code = run_command(['plan', '--help']); "
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--min-psnr" in done.stdout


def test_no_command_prints_the_help(hybridiff):
    ran = hybridiff()
    assert ran.code == 0
    assert "Commands" in ran.out


def test_version(hybridiff):
    ran = hybridiff("--version")
    assert (ran.code, ran.out.split()[0]) == (0, "hybridiff")


def test_the_package_is_the_command_line_too():
    """For environments whose scripts are not on the path."""
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "hybridiff_compiler", *arguments], capture_output=True, text=True)

    told, wrong = run("--version"), run("no-such-command")
    assert told.returncode == 0
    assert "0.1" in told.stdout
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")


def test_help_prints_every_default(hybridiff, monkeypatch):
    """Square brackets in a help text are markup to the printer: what they hold would be lost."""
    monkeypatch.setenv("COLUMNS", "300")
    for name, command in typer.main.get_command(app).commands.items():
        printed = hybridiff(name, "--help").out
        for parameter in command.params:
            assert "[" not in (getattr(parameter, "help", None) or ""), f"{name}: {parameter.name}"
        if name == "profile":
            assert "[default: (50)]" in printed
            assert "[default: (float32 on cpu, float16 on cuda)]" in printed
