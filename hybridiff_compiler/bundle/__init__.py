"""Bundles: a plan with its stage graphs compiled ahead, in one folder that is loaded without compiling.

`write_bundle` makes one, `Bundle.open` reads and checks it, `open_graphs` loads its graphs for a denoiser, which is
neither captured nor compiled for that. Checks come first, whatever the folder holds: hashes, paths, versions and the
device are right before anything in it is loaded. The hashes guard against damage and mix-ups, not against malice:
compiled artifacts are programs, so load bundles from people whose programs you would run.
"""

from .loading import StoredGraphs, open_graphs
from .manifest import Artifact, FileRecord, Manifest
from .reading import Bundle, resolve_plan
from .writing import write_bundle

__all__ = [
    "Artifact", "Bundle", "FileRecord", "Manifest", "StoredGraphs", "open_graphs", "resolve_plan", "write_bundle",
]
