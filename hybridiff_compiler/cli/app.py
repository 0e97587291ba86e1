"""The Typer application: one command per file."""

from __future__ import annotations

from typing import Annotated

import typer

from . import bench, compile, demo, plan, profile, refine, run, show, verify

__all__ = ["app"]

app = typer.Typer(
    name="hybridiff",
    no_args_is_help=False,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def about(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Plan and run diffusion inference on several GPUs: profile a pipeline, solve for a schedule, run it."""
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"hybridiff {version_of('hybridiff-compiler')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


for module in (demo, profile, plan, refine, compile, run, verify, bench, show):
    app.command(name=module.__name__.rpartition(".")[2])(module.command)
