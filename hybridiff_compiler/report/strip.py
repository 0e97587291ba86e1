"""Schedules as strips: one letter per step, so that fifty steps fit on a line and patterns of patterns show."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence

from ..ir import FixedSchedule, Schedule

__all__ = ["count_patterns", "legend", "letters", "representative_steps", "strip"]

_PREFERRED = {
    "single": "S", "branch": "B", "paper": "P", "cond-pipe": "c", "cond-pipe-unguided": "u", "branch-reuse": "r",
    "reuse": ".", "trend": "/", "half-trend": "-",
}


def letters(names: Iterable[str]) -> dict[str, str]:
    """A letter for every pattern name, each used once; the known families keep theirs where they can."""
    result: dict[str, str] = {}
    for name in dict.fromkeys(names):
        family, _, partition = name.partition(":")
        wanted = _PREFERRED.get(family, family[:1])
        candidates = [wanted, wanted.swapcase(), *partition[:1], *string.ascii_letters, *string.digits]
        result[name] = next(c for c in candidates if c not in result.values() and not c.isspace())
    return result


def strip(steps: Sequence[str], alphabet: Mapping[str, str]) -> str:
    """The letters of `steps`."""
    return "".join(alphabet[name] for name in steps)


def legend(alphabet: Mapping[str, str]) -> str:
    """`B branch  . reuse`."""
    return "   ".join(f"{letter} {name}" for name, letter in alphabet.items())


def count_patterns(steps: Iterable[str]) -> dict[str, int]:
    """How many steps run each pattern, in order of first use."""
    counts: dict[str, int] = {}
    for name in steps:
        counts[name] = counts.get(name, 0) + 1
    return counts


def representative_steps(schedule: Schedule) -> tuple[str, ...]:
    """The steps of a fixed schedule; of one found while generating, those that run without measurements (the
    latest window, the last choice)."""
    return schedule.steps if isinstance(schedule, FixedSchedule) else schedule.resolve([]).steps
