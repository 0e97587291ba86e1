"""Partitions: a denoiser's layers divided into stages."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import field_validator, model_validator

from .data import Data
from .errors import PlanMismatchError
from .layers import LayerGraph, Value

__all__ = ["WHOLE", "Partition"]

WHOLE = "whole"
"""Name of the one-stage partition; it needs no entry in a plan."""


class Partition(Data):
    """Stages as sets of layer names, listed in execution order; the last stage holds the output layer.

    Stages need not be contiguous: in a nested split stage 0 is an inner run of layers and stage 1 everything around
    it. Such a split is cyclic between stages and can only be scheduled when some of its edges are stale.
    """

    name: str
    stages: tuple[tuple[str, ...], ...]
    recomputed: tuple[tuple[str, ...], ...] = ()
    """Per stage, layers of other stages that it evaluates itself instead of receiving their values (rotary tables,
    modulation embeddings: cheaper to compute than to send, and never stale). Empty: none anywhere."""

    @field_validator("stages")
    @classmethod
    def _stages(cls, stages: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        if not stages or any(not stage for stage in stages):
            raise ValueError("a partition has at least one stage and every stage at least one layer")
        return stages

    @model_validator(mode="after")
    def _disjoint(self) -> Partition:
        names = [name for stage in self.stages for name in stage]
        if len(names) != len(set(names)):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"partition {self.name!r}: layers {twice[:3]} are in more than one stage")
        if self.recomputed and len(self.recomputed) != len(self.stages):
            raise ValueError(
                f"partition {self.name!r} lists recomputed layers of {len(self.recomputed)} stages, it has "
                f"{len(self.stages)}; give one list per stage, or none at all"
            )
        for index, (own, extra) in enumerate(zip(self.stages, self.recomputed)):
            wrong = sorted({*own}.intersection(extra) | {*extra}.difference(names))
            if wrong or len({*extra}) != len(extra):
                raise ValueError(
                    f"partition {self.name!r}: stage {index} can recompute layers of other stages, each once; got "
                    f"{wrong[:3] or list(extra)[:3]}"
                )
        return self

    @classmethod
    def whole(cls, graph: LayerGraph) -> Partition:
        """The one-stage partition of `graph`."""
        return cls(name=WHOLE, stages=(graph.names,))

    def check_covers(self, graph: LayerGraph) -> None:
        """Raise `PlanMismatchError` unless the stages hold exactly the layers of `graph` and end with its output."""
        mine, theirs = {name for stage in self.stages for name in stage}, set(graph.names)
        if mine != theirs:
            missing, unknown = sorted(theirs - mine)[:3], sorted(mine - theirs)[:3]
            raise PlanMismatchError(
                f"partition {self.name!r} does not fit this denoiser: {len(theirs - mine)} layers missing {missing}, "
                f"{len(mine - theirs)} unknown {unknown}; make the plan again from a profile of this model"
            )
        if any(graph.output in extra for extra in self.recomputed):
            raise PlanMismatchError(f"partition {self.name!r}: output layer {graph.output!r} cannot be recomputed")
        if graph.output not in self.stages[-1]:
            raise PlanMismatchError(f"partition {self.name!r}: output layer {graph.output!r} must be in the last stage")

    def evaluated(self, stages: Iterable[int]) -> tuple[str, ...]:
        """The layers that run when `stages` are evaluated as one graph: their own, then those they recompute."""
        chosen = tuple(stages)
        own = [name for stage in chosen for name in self.stages[stage]]
        extra = [name for stage in chosen if self.recomputed for name in self.recomputed[stage]]
        return tuple(dict.fromkeys(own + extra))

    def received(self, graph: LayerGraph, source: int, targets: Iterable[int]) -> tuple[Value, ...]:
        """The values of stage `source` that `targets`, evaluated as one graph, take from it."""
        inside = self.evaluated(targets)
        return graph.crossing(set(self.stages[source]).difference(inside), inside)

    def cut(self, graph: LayerGraph, source: int, target: int) -> tuple[Value, ...]:
        """The values that stage `target` reads from stage `source`."""
        return self.received(graph, source, (target,))

    def is_nested(self, graph: LayerGraph) -> bool:
        """Whether some stage both feeds and reads a later one (the split is cyclic between stages)."""
        return any(
            self.cut(graph, later, earlier) for earlier in range(len(self.stages))
            for later in range(earlier + 1, len(self.stages))
        )
