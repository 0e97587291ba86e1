"""Bundles in words and tables: what `hybridiff show` and `hybridiff compile` print."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from ..bundle import Bundle
from .style import plain_table

__all__ = ["describe_bundle"]


def describe_bundle(bundle: Bundle) -> list[RenderableType]:
    """Target, artifacts and their sizes, for printing."""
    manifest, model = bundle.manifest, bundle.plan.model
    target = manifest.target
    versions = ", ".join(f"{name} {version}" for name, version in target.versions.items())
    weights = "read from the live model" if manifest.artifacts[0].weights is None else "inside the bundle"
    table = plain_table("\nartifacts", "file", "runs", "ranks", "inputs", "outputs", "KiB", "sha256", left=2)
    for artifact in manifest.artifacts:
        table.add_row(
            artifact.file, Text("; ".join(artifact.segments)), ",".join(map(str, artifact.ranks)),
            str(len(artifact.inputs)), str(len(artifact.outputs)), _kib(artifact.size), artifact.sha256[:12],
        )
    for record, what in (
        *((record, "shared by all") for record in manifest.shared), (manifest.plan, "the plan"),
        (manifest.graphs, "what was captured"),
    ):
        table.add_row(record.file, what, "", "", "", _kib(record.size), record.sha256[:12])
    return [
        Text(f"\nbundle for {model.name} ({model.denoiser}, {target.dtype}): {manifest.backend} for {target.device} "
             f"{target.arch}", style="bold"),
        Text(f"made with {versions}; weights {weights}; {len(manifest.artifacts)} artifacts, "
             f"{sum(record.size for record in manifest.files) / 2**20:.1f} MiB"),
        table,
    ]


def _kib(size: int) -> str:
    return f"{size / 2**10:.0f}"
