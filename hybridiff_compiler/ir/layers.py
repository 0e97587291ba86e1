"""The layer graph: what a captured denoiser looks like to the planner.

Nodes are *layers* (groups of fx nodes, such as one transformer block or one resnet); the tensors that flow between
them are *values*. A value with several consumers is one hyper-edge: cutting it costs its bytes once per receiving
stage, however many layers there read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import networkx as nx
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from .data import Data

__all__ = ["Layer", "LayerGraph", "Value"]


class Layer(Data):
    """A group of operations that is never split."""

    name: str
    """Unique; the module path of the group, with `#k` appended when a module contributes several groups."""
    kind: str = ""
    """Class name of the module the group comes from; for display only."""
    parameter_bytes: int = Field(default=0, ge=0)
    """Bytes of the parameters and buffers read by this layer (shared ones count in each reader)."""
    flops: float = Field(default=0.0, ge=0)
    """Multiply-adds counted as two, at the captured batch size."""
    traffic_bytes: int = Field(default=0, ge=0)
    """Bytes read and written at the captured batch size, parameters included, with elementwise operations fused
    between matrix products; 0 in graphs from before this was counted."""
    once_bytes: int = Field(default=0, ge=0)
    """Bytes of what compiled graphs compute of it once per generation and keep; 0 in graphs from before this was
    counted, as the next two."""
    timed_bytes: int = Field(default=0, ge=0)
    """Bytes of what they compute for many timesteps at a time, for all of these."""
    takes_timestep: bool = False
    """Whether it reads the timestep; a stage without such a layer computes nothing for many timesteps."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value or name not in _LATER}


_LATER = frozenset({"once_bytes", "timed_bytes", "takes_timestep"})
"""Fields that older graphs lack: left out where they say nothing, so that digests of such graphs stay what they are."""


class Value(Data):
    """A tensor produced by one layer and read by at least one other."""

    name: str
    """Unique; the fx node name."""
    producer: str
    consumers: tuple[str, ...]
    shape: tuple[int, ...]
    """At the captured batch size."""
    dtype: str
    """torch dtype without the `torch.` prefix, e.g. `float16`; `int` for a symbolic integer."""
    nbytes: int = Field(ge=0)


class LayerGraph(Data):
    """Layers in execution order and the values between them; acyclic by validation.

    The last layer in `layers` that has no consumers produces the denoiser's estimate and is named `output`.
    """

    layers: tuple[Layer, ...]
    values: tuple[Value, ...]
    output: str
    """Name of the layer that produces the denoiser's estimate."""

    @model_validator(mode="after")
    def _check(self) -> LayerGraph:
        position = {layer.name: index for index, layer in enumerate(self.layers)}
        if len(position) != len(self.layers):
            raise ValueError("layer names must be unique")
        if self.output not in position:
            raise ValueError(f"output layer {self.output!r} is not among the {len(position)} layers")
        names = set()
        for value in self.values:
            if value.name in names:
                raise ValueError(f"value {value.name!r} appears twice")
            names.add(value.name)
            if value.producer not in position:
                raise ValueError(f"value {value.name!r} has unknown producer {value.producer!r}")
            for consumer in value.consumers:
                if consumer not in position:
                    raise ValueError(f"value {value.name!r} has unknown consumer {consumer!r}")
                if position[consumer] <= position[value.producer]:
                    raise ValueError(
                        f"value {value.name!r} flows backwards from {value.producer!r} to {consumer!r}; "
                        "layers must be listed in execution order"
                    )
        return self

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Layer names in execution order."""
        return tuple(layer.name for layer in self.layers)

    def fingerprint(self) -> str:
        """sha256 over names, values and shapes: equal exactly when plans for one graph fit the other."""
        text = repr([self.names, [(v.name, v.producer, v.consumers, v.shape, v.dtype) for v in self.values]])
        return hashlib.sha256(text.encode()).hexdigest()

    def to_networkx(self) -> nx.DiGraph:
        """A DiGraph over layer names; node attribute `layer`, edge attributes `nbytes` and `values`."""
        graph = nx.DiGraph()
        for layer in self.layers:
            graph.add_node(layer.name, layer=layer)
        for value in self.values:
            for consumer in value.consumers:
                if graph.has_edge(value.producer, consumer):
                    graph.edges[value.producer, consumer]["nbytes"] += value.nbytes
                    graph.edges[value.producer, consumer]["values"].append(value.name)
                else:
                    graph.add_edge(value.producer, consumer, nbytes=value.nbytes, values=[value.name])
        return graph

    def crossing(self, producers: Iterable[str], consumers: Iterable[str]) -> tuple[Value, ...]:
        """Values produced inside `producers` and read inside `consumers` (layer names), in graph order."""
        sources, targets = frozenset(producers), frozenset(consumers)
        return tuple(v for v in self.values if v.producer in sources and not targets.isdisjoint(v.consumers))
