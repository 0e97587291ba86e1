"""What a bundle records of the captured denoiser, so that whoever loads it need not capture anything."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ..backends.stage_io import TensorSpec
from ..ir import Data, Document, LayerGraph
from .identity import ModelIdentity
from .manifest import Sha256

__all__ = ["CONSTANTS_FILE", "Constant", "GraphRecord", "Graphs"]

CONSTANTS_FILE = "constants.safetensors"


class GraphRecord(Data):
    """What must be known of one compiled stage graph, beyond the inputs and outputs of its artifact."""

    graph: Sha256
    """Digest of the graph: the artifact's."""
    leaves: int = Field(ge=0)
    """How many of the artifact's inputs, the first ones, are inputs of the denoiser; the others are values."""
    weights: tuple[TensorSpec, ...]
    """Every tensor that the graph reads besides its inputs, by qualified name in the denoiser."""


class Constant(Data):
    """A tensor that the denoiser's forward makes from Python values; its value is in the file of constants."""

    name: str
    follows: bool
    """Whether it lives on the denoiser's device; otherwise on the CPU."""


class Graphs(Document):
    """The captured denoiser without its operations."""

    kind: Literal["graphs"] = "graphs"
    schema_version: Literal[1] = 1
    identity: ModelIdentity
    """Of the denoiser that was captured."""
    layers: LayerGraph
    estimate: TensorSpec
    """What one branch's call returns."""
    graphs: tuple[GraphRecord, ...] = Field(min_length=1)
    constants: tuple[Constant, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        digests = [record.graph for record in self.graphs]
        if len(set(digests)) != len(digests):
            raise ValueError("the same graph is recorded twice")
        names = [constant.name for constant in self.constants]
        if len(set(names)) != len(names):
            raise ValueError("the same constant is recorded twice")
        return self

    def record(self, digest: str) -> GraphRecord | None:
        """What is known of the graph with this digest."""
        return next((record for record in self.graphs if record.graph == digest), None)
