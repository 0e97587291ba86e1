"""A graph that takes a timestep, made one that takes many of them at a time."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..capture import StageGraph

__all__ = ["STEPS", "for_steps", "repeated"]

STEPS = 64
"""Timesteps at a time; a generation with more of them takes several turns."""

_GROWTH = 8
"""A batched operation becomes a few; one that has to be repeated `STEPS` times as many and more."""


def for_steps(stage: StageGraph) -> StageGraph | None:
    """The same computation for `STEPS` values of the first argument, stacked along a new first dimension, as are the
    results; all other arguments are shared. Equal up to rounding: products of many rows may add up in another order.
    None if torch can only do them one after the other (an operation without a rule for `vmap`).
    """
    module = stage.module
    names = list(dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "get_attr"))
    weights = [operator.attrgetter(name)(module) for name in names]
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    count = len(names)

    def evaluate(*given: Tensor) -> tuple[Tensor, ...]:
        held = dict(zip(names, given[:count]))
        each = torch.func.vmap(
            lambda *arguments: _Evaluation(module, held).run(*arguments), in_dims=(0, *[None] * (len(values) - 1))
        )
        results: tuple[Tensor, ...] = each(*given[count:])
        return tuple(result.contiguous() for result in results)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in (*weights, *values)]
        fake[count] = torch.empty((STEPS, *values[0].shape), dtype=values[0].dtype, device=values[0].device)
        try:
            traced = make_fx(evaluate)(*fake)
        except RuntimeError:
            return None
    if len(traced.graph.nodes) > len(names) + _GROWTH * len(module.graph.nodes):
        return None
    traced.graph.eliminate_dead_code()
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for node in placeholders[count:]:
        copied[node] = graph.node_copy(node)
    for name, node in zip(names, placeholders):
        if node.users:
            copied[node] = graph.get_attr(name)
            copied[node].meta = dict(node.meta)
    for node in traced.graph.nodes:
        if node not in copied and node.op != "placeholder":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    return replace(stage, module=fx.GraphModule(module, graph, class_name="ForSteps").eval())


def repeated(timestep: Tensor) -> Tensor:
    """`[STEPS, ...]`: one timestep in the place of many, in memory of its own."""
    return timestep.expand(STEPS, *timestep.shape).clone(memory_format=torch.contiguous_format)


class _Evaluation(fx.Interpreter):
    """Evaluates a graph with given tensors in the place of its weights."""

    def __init__(self, module: fx.GraphModule, weights: dict[str, Tensor]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._weights = weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._weights[target]
