"""What is known of prompts that are generated together, and how a `Partial` keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .record import Option
from .sensitivity import Sketches

__all__ = ["Batch", "block_borders", "blocks_of"]

_BLOCK = 12
"""Prompts that a whole schedule is measured on."""


@dataclass
class Batch:
    """Prompts generated together."""

    first: int
    prompts: list[str]
    final: Tensor = field(default_factory=lambda: torch.empty(0))
    rel_mae: list[list[float]] = field(default_factory=list)
    """Per prompt, per step."""
    changes: list[dict[str, float]] = field(default_factory=list)
    sketches: Sketches | None = None
    pairs: Tensor = field(default_factory=lambda: torch.empty(0))
    """Exact estimates of the first steps, [steps, 2, P, ...]; of none where they would take much memory."""

    @property
    def name(self) -> str:
        """In the `Partial`."""
        return f"prompts {self.first}-{self.first + len(self.prompts) - 1}"

    def kept(self, options: Sequence[Option]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `restore` needs: JSON values and tensors; `options` are those that were recorded."""
        data: dict[str, Any] = {"rel_mae": self.rel_mae, "changes": self.changes}
        tensors = {"final": self.final, "pairs": self.pairs}
        if self.sketches is not None:
            entries = [(step, option) for step, row in enumerate(self.sketches.steps) for option in row]
            data |= {
                "steps": len(self.sketches.steps), "pixels": self.sketches.pixels,
                "entries": [(step, options.index(option)) for step, option in entries],
            }
            tensors["sketches"] = torch.stack([self.sketches.steps[step][option] for step, option in entries])
        return data, tensors

    def restore(
        self, tensors: Mapping[str, Tensor], data: Mapping[str, Any], options: Sequence[Option], device: torch.device
    ) -> None:
        """Take what `kept` gave, with the same `options`."""
        self.final = tensors["final"].to(device)
        self.pairs, self.rel_mae, self.changes = tensors["pairs"], data["rel_mae"], data["changes"]
        if "sketches" in tensors:
            rows: list[dict[Option, Tensor]] = [{} for _ in range(data["steps"])]
            for (step, index), sketch in zip(data["entries"], tensors["sketches"]):
                rows[step][options[index]] = sketch
            self.sketches = Sketches(rows, data["pixels"])


def block_borders(prompts: int) -> list[int]:
    """Where the blocks of prompts begin and end: about a dozen each, two blocks at least, but none of a single prompt,
    which would not tell how prompts differ (fewer than four make one block)."""
    count = min(max(1, prompts // 2), max(2, round(prompts / _BLOCK)))
    return [round(k * prompts / count) for k in range(count + 1)]


def blocks_of(batches: Sequence[Batch], borders: Sequence[int], size: int) -> list[list[Batch]]:
    """The prompts of `batches` in blocks between `borders`, each in batches of up to `size`."""
    single = [
        (batch.first + k, prompt, batch.final[k : k + 1], batch.pairs[:, :, k : k + 1])
        for batch in batches for k, prompt in enumerate(batch.prompts)
    ]
    result = []
    for begin, end in pairwise(borders):
        block = []
        for k in range(begin, end, size):
            first, prompts, finals, pairs = zip(*single[k : min(k + size, end)])
            block.append(Batch(first[0], list(prompts), torch.cat(finals), pairs=torch.cat(pairs, dim=2)))
        result.append(block)
    return result
