"""Frozen data with an exact JSON round trip: the base of every file format of the package."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import InputError
from .files import parse_json, write_text_atomically

__all__ = ["Data", "Document"]

_MAX_REPORTED_ERRORS = 3


class Data(BaseModel):
    """A frozen value object: unknown fields are refused, NaN and infinity are not representable."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields replaced; what cached properties remember stays behind, since it may not fit."""
        copy = super().model_copy(update=update, deep=deep)
        for name in copy.__dict__.keys() - type(self).model_fields.keys():
            del copy.__dict__[name]
        return copy


class Document(Data):
    """A `Data` object that lives in a file of its own and starts with a schema version.

    Subclasses set `kind` and `schema_version` defaults (pydantic `Literal` fields), so that a file of another kind or
    version is refused by name.
    """

    def digest(self) -> str:
        """sha256 over the canonical JSON form (sorted keys, no white space), as 64 hex digits."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the document as indented JSON (diffable); atomic: the old file stays until the new one is complete."""
        return write_text_atomically(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a document written by `save`.

        Raises:
            InputError: the file is missing, is not JSON, or does not validate; the message names the first problems.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InputError(f"{file}: no such file; give the path of a {cls.__name__.lower()} JSON file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read as a {cls.__name__.lower()}: {error}") from None
        return cls.parse(text, source=str(file))

    @classmethod
    def parse(cls, text: str, *, source: str = "<text>") -> Self:
        """Parse and validate JSON text; `source` names it in error messages.

        Raises:
            InputError: as for `load`.
        """
        noun = cls.__name__.lower()
        payload = parse_json(text, source=source, noun=noun)
        try:
            return cls.model_validate(payload)
        except ValidationError as error:
            problems = "; ".join(_describe(item) for item in error.errors()[:_MAX_REPORTED_ERRORS])
            more = error.error_count() - _MAX_REPORTED_ERRORS
            suffix = f" (and {more} more)" if more > 0 else ""
            raise InputError(f"{source}: not a valid {noun}: {problems}{suffix}") from None


def _describe(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "document"
    return f"{where}: {item['msg']}"
