"""How much memory the results of hoisted parts take up, layer by layer: known from the graph, before anything runs."""

from __future__ import annotations

from torch import Tensor

from ..capture import CapturedDenoiser, StageGraph
from ..ir import LayerGraph
from .hoisting import hoist

__all__ = ["with_hoisted"]


def with_hoisted(captured: CapturedDenoiser) -> LayerGraph:
    """The layer graph with `Layer.once_bytes`, `Layer.timed_bytes` and `Layer.takes_timestep` filled in.

    Stages are hoisted one by one, each at most of what the whole denoiser is: what a stage receives from another one is
    not known to stay the same.
    """
    whole = captured.whole()
    parts = hoist(whole)
    once = {} if parts is None or parts.once is None else _result_bytes(parts.once)
    timed = {} if parts is None or parts.timed is None else _result_bytes(parts.timed)
    placeholders = [node for node in whole.module.graph.nodes if node.op == "placeholder"]
    timestep = next((node for node, path in zip(placeholders, whole.inputs) if path == whole.timestep), None)
    readers = set() if timestep is None else {captured.layer_of[user.name] for user in timestep.users}
    layers = tuple(
        layer.model_copy(update={
            "once_bytes": sum(n for name, n in once.items() if captured.layer_of[name] == layer.name),
            "timed_bytes": sum(n for name, n in timed.items() if captured.layer_of[name] == layer.name),
            "takes_timestep": layer.name in readers,
        })
        for layer in captured.layers.layers
    )
    return captured.layers.model_copy(update={"layers": layers})


def _result_bytes(part: StageGraph) -> dict[str, int]:
    """By node of the denoiser's graph."""
    (results,) = part.module.graph.output_node().args
    sizes = []
    for node in results:  # type: ignore[union-attr]
        value = node.meta["val"]  # type: ignore[union-attr]
        assert isinstance(value, Tensor), "parts return tensors"
        sizes.append(value.numel() * value.element_size())
    return dict(zip(part.values_out, sizes, strict=True))
