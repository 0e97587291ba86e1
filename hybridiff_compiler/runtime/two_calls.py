"""Guidance by two calls per step (Flux, Qwen-Image, Wan, ...): finding the pairs, and having both at the first call.

Such pipelines ask for the conditional estimate, then for the unconditional one, with the same latents and timestep. To
let both branches run side by side, the second call's inputs must be known at the first: whatever was equal in both
calls of the first step is taken from the present first call, everything else (the negative prompt's embeddings) is
what the last second call had. The second call is compared with that before it gets its estimate.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..ir import BRANCHES, Branch, CallSignature

__all__ = ["TwoCalls", "differing_shapes"]

_Leaves = Mapping[str, Tensor]


class TwoCalls:
    """What the two calls of a step have in common, learned from the first step of a generation."""

    def __init__(self, first: _Leaves, second: _Leaves, latents: str) -> None:
        """
        Args:
            first, second: leaf path -> tensor of the two calls of one step; see `is_pair`.
            latents: path of the latents, which always have to agree: that is what tells two steps apart.
        """
        self._own = {path: tensor for path, tensor in second.items() if not _equal(first[path], tensor)}
        # Made anew for every call, so no address tells that they are equal; comparing would wait for the GPU.
        self._copies = {
            path for path, tensor in second.items()
            if path not in self._own and path != latents and not _same(first[path], tensor)
            and tensor.device.type != "cpu"
        }

    @staticmethod
    def is_pair(first: _Leaves, second: _Leaves, latents: str, timestep: str) -> bool:
        """Whether two calls of one signature are the branches of one step: one state, different conditioning."""
        return all(_equal(first[path], second[path]) for path in (latents, timestep)) and any(
            not _equal(first[path], tensor) for path, tensor in second.items()
        )

    def inputs(self, first: _Leaves) -> dict[Branch, dict[str, Tensor]]:
        """Both branches' leaves, from the conditional call alone."""
        uncond, cond = BRANCHES
        return {uncond: {path: self._own.get(path, tensor) for path, tensor in first.items()}, cond: dict(first)}

    def fits(self, expected: _Leaves, second: _Leaves) -> bool:
        """Whether the second call came with the inputs that its estimate was computed for."""
        return all(path in self._copies or _equal(expected[path], tensor) for path, tensor in second.items())


def differing_shapes(first: CallSignature, second: CallSignature) -> str | None:
    """What keeps two calls from being two branches of one plan, when only shapes do; None: something else."""
    if [leaf.path for leaf in first.leaves] != [leaf.path for leaf in second.leaves]:
        return None
    different = [(a, b) for a, b in zip(first.leaves, second.leaves) if a != b]
    if not different or any(a.shape is None or b.shape is None or a.dtype != b.dtype for a, b in different):
        return None
    return ", ".join(f"{a.path} {a.shape} and {b.shape}" for a, b in different)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    return _same(one, other) or (one.shape == other.shape and bool((one == other).all()))
