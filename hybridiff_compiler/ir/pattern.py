"""Patterns: ways to run one denoising step, as tables.

A pattern lists the *units* of work of a step. Unit `(branch, stage)` evaluates one stage of the denoiser for one
branch on one rank; its reads say, for every other stage, whose output it takes and whether that output is *fresh*
(computed in the same step) or *stale* (the last one computed in an earlier step). `combine` says how the pair of
estimates that classifier-free guidance needs is made from what was computed.

The printable form is exact in both directions, e.g. the paper's parallelism phase on two stages::

    u0@0(c1~) c1@1(u0~) | mirror

reads: the unconditional branch of stage 0 runs on rank 0 with a stale conditional stage 1, and so on. A read that is
not written is a fresh read of the same branch; `~` marks a stale one. `u1-` says that nothing of stage 1 is read, so
that the unit need not wait for it: the front of a linear split reads nothing of the back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from .data import Data
from .errors import InputError
from .partition import WHOLE, Partition

__all__ = ["BRANCHES", "Branch", "Combine", "Pattern", "Read", "Unit", "check_tables"]

Branch = Literal["uncond", "cond"]
BRANCHES: tuple[Branch, Branch] = ("uncond", "cond")
"""In the order of diffusers' batched guidance call."""

_LETTER: dict[Branch, str] = {"uncond": "u", "cond": "c"}
_BRANCH: dict[str, Branch] = {"u": "uncond", "c": "cond"}
_COMBINE = re.compile(r"([a-z]+)(?:\+(\d+(?:\.\d+)?))?")
_UNIT = re.compile(r"([uc])(\d+)@(\d+)(?:\(([^()]*)\))?")
_READ = re.compile(r"([uc])(\d+)([~-]?)")


class Combine(StrEnum):
    """How the pair (unconditional, conditional) of estimates is made from the computed ones."""

    CFG = "cfg"
    """Both branches were computed."""
    MIRROR = "mirror"
    """One estimate was computed and stands for both branches, so guidance vanishes (METHOD.md, phase 2)."""
    DELTA = "delta"
    """One estimate was computed; the other follows from the last known difference between the branches."""
    LAST = "last"
    """Nothing was computed; the last pair that is not mirrored stands in, or with a `Pattern.trend` the last exact one,
    moved on along the line through the last two exact ones."""


class Read(Data):
    """Where a unit takes the values of another stage from."""

    stage: int = Field(ge=0)
    branch: Branch
    stale: bool
    nothing: bool = False
    """Nothing is read: no value of that stage reaches the unit's (the runtime checks it)."""

    @model_validator(mode="after")
    def _one_kind(self) -> Read:
        if self.stale and self.nothing:
            raise ValueError("a read is stale, or of nothing, not both")
        return self

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if not self.nothing:
            fields.pop("nothing", None)
        return fields

    @property
    def fresh(self) -> bool:
        """Whether values of the same step are read."""
        return not self.stale and not self.nothing

    def __str__(self) -> str:
        return f"{_LETTER[self.branch]}{self.stage}{'~' if self.stale else '-' if self.nothing else ''}"


class Unit(Data):
    """One stage of the denoiser for one branch, evaluated on one rank."""

    branch: Branch
    stage: int = Field(ge=0)
    rank: int = Field(ge=0)
    reads: tuple[Read, ...] = ()
    """Reads that differ from the default (fresh, same branch), sorted by stage."""

    def read(self, stage: int) -> Read:
        """How this unit reads `stage` (another stage than its own)."""
        for read in self.reads:
            if read.stage == stage:
                return read
        return Read(stage=stage, branch=self.branch, stale=False)

    def __str__(self) -> str:
        reads = f"({','.join(map(str, self.reads))})" if self.reads else ""
        return f"{_LETTER[self.branch]}{self.stage}@{self.rank}{reads}"


class Pattern(Data):
    """A named table of units over one partition, and how the step's estimates are combined."""

    name: str = Field(min_length=1, pattern=r"^[\w.:@+-]+$")
    partition: str = WHOLE
    stages: int = Field(default=1, ge=1)
    """Number of stages of the partition."""
    units: tuple[Unit, ...] = ()
    combine: Combine
    trend: float = Field(default=0.0, ge=0, le=1)
    """Of `LAST` only: how far the estimates of the last two exact steps, a and b, are extrapolated to this step i:
    `e_b + trend (i - b) / (b - a) (e_b - e_a)`. 1 is the straight line (the rule behind two-step Adams-Bashforth
    methods), 0 repeats what there is."""

    @model_validator(mode="after")
    def _check(self) -> Pattern:
        seen: set[tuple[Branch, int]] = set()
        for unit in self.units:
            key = (unit.branch, unit.stage)
            if key in seen:
                raise ValueError(f"pattern {self.name!r} computes unit {unit} twice; list each (branch, stage) once")
            seen.add(key)
            if unit.stage >= self.stages:
                raise ValueError(f"pattern {self.name!r}: unit {unit} is outside its {self.stages} stages")
            for read in unit.reads:
                if read.stage >= self.stages or read.stage == unit.stage:
                    raise ValueError(
                        f"pattern {self.name!r}: unit {unit} reads stage {read.stage}; allowed are the other stages "
                        f"of 0..{self.stages - 1}"
                    )
            if [read.stage for read in unit.reads] != sorted({read.stage for read in unit.reads}):
                raise ValueError(f"pattern {self.name!r}: unit {unit} must list each read stage once, in order")
            if any(read.fresh and read.branch == unit.branch for read in unit.reads):
                raise ValueError(f"pattern {self.name!r}: unit {unit} lists a default (fresh, same branch) read")
        for unit in self.units:
            other = {unit.stage, *(read.stage for read in unit.reads if not read.fresh)}
            for stage in range(self.stages):  # a table with absurdly many stages fails at the first that it lacks
                read = unit.read(stage)
                if stage not in other and (read.branch, stage) not in seen:
                    raise ValueError(
                        f"pattern {self.name!r}: unit {unit} reads {read} fresh, which no unit computes; "
                        "compute it or mark the read stale with '~'"
                    )
        if self.trend and self.combine is not Combine.LAST:
            raise ValueError(
                f"pattern {self.name!r}: trend {self.trend:g} goes with combine 'last' only, got {self.combine.value!r}"
            )
        computed = len(self.estimated_branches)
        needed = {Combine.CFG: 2, Combine.MIRROR: 1, Combine.DELTA: 1, Combine.LAST: 0}[self.combine]
        if computed != needed:
            raise ValueError(
                f"pattern {self.name!r}: combine {self.combine.value!r} needs {needed} computed estimates, "
                f"got {computed}"
            )
        return self

    @cached_property
    def estimated_branches(self) -> tuple[Branch, ...]:
        """Branches whose last stage is computed, in the order of `BRANCHES`."""
        return tuple(b for b in BRANCHES if any(u.branch == b and u.stage == self.stages - 1 for u in self.units))

    @cached_property
    def is_exact(self) -> bool:
        """Whether both branches are computed completely from fresh values of their own branch."""
        return (
            self.combine is Combine.CFG
            and len(self.units) == 2 * self.stages
            and all(read.nothing for unit in self.units for read in unit.reads)
        )

    @cached_property
    def world_size(self) -> int:
        """Number of ranks the table needs: one more than its highest rank, at least one."""
        return 1 + max((unit.rank for unit in self.units), default=0)

    def unit(self, branch: Branch, stage: int) -> Unit | None:
        """The unit that computes `(branch, stage)`, or None."""
        return next((u for u in self.units if u.branch == branch and u.stage == stage), None)

    @property
    def table(self) -> str:
        """The printable form of the units and the combination; `parse` is its inverse."""
        units = " ".join(map(str, self.units)) or "-"
        return f"{units} | {self.combine.value}{f'+{self.trend:g}' if self.trend else ''}"

    @classmethod
    def parse(cls, name: str, table: str, *, partition: str = WHOLE, stages: int = 1) -> Self:
        """Build a pattern from its printable form.

        Raises:
            InputError: the text does not follow the grammar, or the table is not valid.
        """
        body, bar, combine = table.partition("|")
        combination = _COMBINE.fullmatch(combine.strip())
        if not bar or combination is None or combination[1] not in set(Combine):
            allowed = ", ".join(c.value for c in Combine)
            raise InputError(
                f"pattern {name!r}: {table!r} must end with '| COMBINE', COMBINE one of {allowed} (or last+TREND)"
            )
        units = []
        for word in body.split() if body.strip() != "-" else ():
            match = _UNIT.fullmatch(word)
            if match is None:
                raise InputError(f"pattern {name!r}: unit {word!r} is not of the form u0@1 or c1@0(u0~,c2)")
            reads = []
            for item in filter(None, (match[4] or "").split(",")):
                read = _READ.fullmatch(item.strip())
                if read is None:
                    raise InputError(
                        f"pattern {name!r}: read {item!r} of unit {word!r} is not of the form u0, c1~ or u1-")
                kind = read[3]
                reads.append(
                    Read(stage=int(read[2]), branch=_BRANCH[read[1]], stale=kind == "~", nothing=kind == "-"))
            units.append(
                Unit(branch=_BRANCH[match[1]], stage=int(match[2]), rank=int(match[3]),
                     reads=tuple(sorted(reads, key=lambda r: r.stage)))
            )
        try:
            return cls(
                name=name, partition=partition, stages=stages, units=tuple(units), combine=Combine(combination[1]),
                trend=float(combination[2] or 0),
            )
        except ValueError as error:
            raise InputError(str(error)) from None

    def __str__(self) -> str:
        where = "" if self.partition == WHOLE else f" on {self.partition}"
        return f"{self.name}{where}: {self.table}"


def check_tables(partitions: Sequence[Partition], patterns: Sequence[Pattern], noun: str) -> None:
    """Whether a document's tables fit its partitions.

    Args:
        partitions, patterns: of the document.
        noun: what it is, for messages.

    Raises:
        ValueError: two of a kind have one name, or a pattern has other stages than its partition.
    """
    for what, names in (
        ("partition", [each.name for each in partitions]), ("pattern", [each.name for each in patterns]),
    ):
        if len(names) != len(set(names)):
            raise ValueError(f"{what} names must be unique, got {names}")
    stages = {WHOLE: 1} | {partition.name: len(partition.stages) for partition in partitions}
    for pattern in patterns:
        if stages.get(pattern.partition) != pattern.stages:
            raise ValueError(
                f"pattern {pattern.name!r} expects partition {pattern.partition!r} with {pattern.stages} stages; "
                f"the {noun} has {stages}"
            )
