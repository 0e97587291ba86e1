"""The shapes and constants of one denoiser call: what a captured graph, and so a plan, is valid for."""

from __future__ import annotations

from .data import Data

__all__ = ["CallSignature", "LeafSpec"]


class LeafSpec(Data):
    """One leaf of the call's arguments."""

    path: str
    """Parameter name, then keys and indices, e.g. `added_cond_kwargs.text_embeds`."""
    shape: tuple[int, ...] | None = None
    """None for constants."""
    dtype: str | None = None
    """torch dtype without the prefix; None for constants."""
    constant: str | None = None
    """`repr` of a leaf that is no tensor."""

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.path}={self.constant}"
        return f"{self.path}: {self.dtype}[{','.join(map(str, self.shape))}]"


class CallSignature(Data):
    """All leaves of a call, in a deterministic order."""

    leaves: tuple[LeafSpec, ...]

    def mismatch(self, other: CallSignature) -> str | None:
        """One line naming the first leaf in which `other` (got) differs from this signature (expected), or None."""
        mine = {leaf.path: leaf for leaf in self.leaves}
        theirs = {leaf.path: leaf for leaf in other.leaves}
        for path in dict.fromkeys([*mine, *theirs]):
            if mine.get(path) != theirs.get(path):
                return f"got {theirs.get(path, f'no {path}')}, expected {mine.get(path, f'no {path}')}"
        return None
