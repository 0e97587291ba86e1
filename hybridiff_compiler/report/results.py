"""The JSON of every benchmark: rows per model, in one shape that later tables keep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from ..ir import Data, InputError, write_text_atomically

__all__ = ["BenchModel", "BenchResults", "BenchRow", "ModelResults", "Results", "Row", "parsed"]

_T = TypeVar("_T", bound=Data)


class Row(Data):
    """One way to generate images with one model; null where a column does not apply."""

    name: str
    ranks: int = Field(ge=1)
    steps: int = Field(ge=1)
    """Denoising steps of a generation."""
    patterns: dict[str, int]
    """How many of them run which pattern."""
    latency_s: float | None = None
    """Median time of the denoising loop of one image."""
    speedup: float | None = None
    """Measured, over one rank running the unmodified pipeline."""
    ideal_speedup: float | None = None
    """Measured stage times alone: no communication, no overhead."""
    work_speedup: float | None = None
    """Independent of hardware: denoiser evaluations on the critical path, of one rank over those of the row."""
    predicted_speedup: float | None = None
    psnr_db: float | None = None
    """Mean over prompts, against the exact one-rank image of the same seed; null for exact rows."""
    psnr_db_min: float | None = None
    """The worst prompt's."""
    predicted_psnr_db: float | None = None
    max_abs_diff: float | None = None
    """Largest difference of a pixel (values in [0, 1]) from the exact one-rank image, over prompts."""


class BenchRow(Row):
    """A row of `hybridiff bench`: latency in detail."""

    pixels: int = Field(ge=1)
    """Width and height of the image."""
    loop_s: float
    """Median time of the denoising loop, from the first denoiser call to the last scheduler step."""
    end_to_end_s: float | None = None
    """Median time of the whole call until the image is on the device: text encoders where the pipeline has them (with
    random weights it has none: embeddings are given), loop, VAE decode. null: the pipeline has no VAE."""
    decode: str | None = None
    """Who decoded for `end_to_end_s`: `pipeline`, `driver`, `rows` (see `parallelize`)."""
    speedup_vs_strong: float | None = None
    """Over `single-compiled` of the same run."""
    speedup_vs_eager: float | None = None
    """Over `single-eager` of the same run."""
    overhead_fraction: float | None = None
    """How much longer the loop takes than the stage graphs of the slowest rank of every step, one after the other."""
    stage_s: dict[str, float] | None = None
    """Time of the slowest rank's stage graphs in one step, by pattern."""
    predicted_s: float | None = None
    """What the profile that the run was given predicts for the loop."""
    bytes_per_step: int | None = None
    """Sent and received by rank 0."""
    peak_gib: float | None = None
    """Memory of the rank that needed most while graphs were built and in the rows so far, without the pipeline's own
    decode: reserved by torch on a GPU, else resident. `single-eager` counts alone."""
    predicted_peak_gib: float | None = None
    """What was predicted for that but for the allocator's share (see `planner.memory`), with what else of the pipeline
    is on rank 0; on GPUs."""


class BenchModel(Data):
    """All bench rows of one model."""

    rows: tuple[BenchRow, ...]


class BenchResults(Data):
    """One run of `hybridiff bench`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    device: str
    gpus: int
    versions: dict[str, str]
    seed: int
    random_weights: bool
    """Random weights: the latencies are real, the images mean nothing."""
    notes: tuple[str, ...] = ()
    """What a reader of the figures must know."""
    models: dict[str, BenchModel]

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON, atomically."""
        return write_text_atomically(path, self.model_dump_json(indent=1, by_alias=True) + "\n")

    @classmethod
    def parse(cls, payload: Any, *, source: str) -> BenchResults:
        """As `Results.parse`."""
        return parsed(cls, payload, source)


class ModelResults(Data):
    """All rows of one model."""

    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """The row called `name`."""
        return next(row for row in self.rows if row.name == name)


class Results(Data):
    """One benchmark run: `{"schema": 1, "device": ..., "models": {"unet": {"rows": [...]}}}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    device: str
    models: dict[str, ModelResults]

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON, atomically."""
        return write_text_atomically(path, self.model_dump_json(indent=1, by_alias=True) + "\n")

    @classmethod
    def parse(cls, payload: Any, *, source: str) -> Results:
        """Validate a JSON object that `to_json` made.

        Raises:
            InputError: it does not have the shape; the message names the first problem.
        """
        return parsed(cls, payload, source)


def parsed(kind: type[_T], payload: Any, source: str) -> _T:
    """What `Results.parse` does, for results of any kind."""
    try:
        return kind.model_validate(payload)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "document"
        raise InputError(f"{source}: not a valid benchmark result: {where}: {first['msg']}") from None
