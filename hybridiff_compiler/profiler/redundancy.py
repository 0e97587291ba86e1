"""Temporal redundancy of every value between layers, measured before the partitions are chosen that cut some of them.

What the partitioner wants to know of a value is how much of it is lost when it is read one step old. That takes no
partition to measure: an exact generation runs through the captured graph node by node, and every value that goes from
one layer to another is compared with what it was a step before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from ..capture import CapturedDenoiser
from ..ir import BRANCHES, Branch, CallSignature, Redundancy
from ..runtime.intercept import GuidedCall
from .generate import Generation
from .partial import Partial

__all__ = ["SURVEYED_PROMPTS", "sampled", "survey_redundancy"]

SURVEYED_PROMPTS = 2
"""Prompts that the survey generates. How much a layer's output moves in a step is a matter of the layer and the noise
level more than of the prompt: on the bundled models it differs by 4 % between prompts (`tools/check_redundancy.py`),
and cuts that differ by less are as good as each other."""
_SAMPLE = 1 << 16
"""Elements of a value that are compared, evenly spread: a mean over so many is good to a hundredth, and a large
denoiser's values of a whole step would not fit beside it."""


def survey_redundancy(
    captured: CapturedDenoiser,
    generation: Generation,
    prompts: Sequence[str],
    partial: Partial,
    *,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Redundancy:
    """Relative change per step of every value of the layer graph, in exact generations of `prompts`, one by one.

    Args:
        captured: the denoiser at one branch of one image.
        generation: how images are made.
        prompts: one or more.
        partial: keeps what is finished.
        on_step: called with (steps done, steps in all).

    Returns:
        `Redundancy` with a row for every value that some layer reads from another one.
    """
    kept = partial.get("redundancy")
    if kept is not None:
        return Redundancy.model_validate(kept[1])
    rows: list[list[dict[str, float]]] = []
    for first, prompt in enumerate(prompts):
        survey = _Survey(captured, on_step, first, len(prompts))
        generation.latents([prompt], survey, first)
        rows.append(survey.changes())
    steps = min(map(len, rows))
    names = [value.name for value in captured.layers.values]
    found = Redundancy(change={
        name: tuple(float(f"{sum(row[step][name] for row in rows) / len(rows):.4g}") for step in range(steps))
        for name in names
    })
    partial.put("redundancy", found.model_dump(mode="json"))
    return found


class _Survey:
    """A `StepHandler` that runs every step exactly, node by node, and compares values with the step before."""

    def __init__(
        self, captured: CapturedDenoiser, on_step: Callable[[int, int], None], number: int, count: int
    ) -> None:
        self._stage = captured.whole()
        self._on_step, self._number, self._count = on_step, number, count
        self._names = {value.name: index for index, value in enumerate(captured.layers.values)}
        self._before: dict[tuple[Branch, str], Tensor] = {}
        self._steps: list[Tensor] = []
        """Per step from the second on, [2, values]: sums over both branches of the mean |change| and of the mean
        |value| before."""

    def start(self, num_steps: int, signature: CallSignature) -> bool:
        """See `StepHandler.start`."""
        return True

    @torch.no_grad()
    def step(self, call: GuidedCall) -> Mapping[Branch, Tensor]:
        """See `StepHandler.step`."""
        pair: dict[Branch, Tensor] = {}
        sums: Tensor | None = None
        for branch in BRANCHES:
            leaves = call.inputs[branch]
            seen = _Watch(self._stage.module, self._names)
            (pair[branch],) = seen.run(*(leaves[path] for path in self._stage.inputs))
            for name, value in seen.values.items():
                before = self._before.get((branch, name))
                self._before[branch, name] = value
                if before is not None:
                    if sums is None:
                        sums = torch.zeros(2, len(self._names), device=value.device)
                    sums[0, self._names[name]] += (value - before).abs().mean()
                    sums[1, self._names[name]] += before.abs().mean()
        if sums is not None:
            self._steps.append(sums)
        self._on_step(self._number * call.num_steps + call.step + 1, self._count * call.num_steps)
        return pair

    def changes(self) -> list[dict[str, float]]:
        """Per step from the second on: relative change by value."""
        table = torch.stack(self._steps)
        ratios = (table[:, 0] / table[:, 1].clamp_min(1e-30)).tolist()
        return [dict(zip(self._names, row)) for row in ratios]


class _Watch(fx.Interpreter):
    """Runs a graph and keeps a sample of the values of some nodes."""

    def __init__(self, module: fx.GraphModule, names: Mapping[str, int]) -> None:
        super().__init__(module)
        self._wanted = names
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        """See `fx.Interpreter.run_node`."""
        result = super().run_node(n)
        if n.name in self._wanted and isinstance(result, Tensor) and result.numel():
            self.values[n.name] = sampled(result)
        return result


def sampled(value: Tensor) -> Tensor:
    """Evenly spread elements of `value`, in fp32: real and imaginary parts, and 0 for what is not finite (masks)."""
    real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    part = real.flatten()[:: -(-real.numel() // _SAMPLE)].float()
    return torch.nan_to_num(part, nan=0.0, posinf=0.0, neginf=0.0)
