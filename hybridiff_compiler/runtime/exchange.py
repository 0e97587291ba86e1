"""Which values move between ranks, and when: pure functions of the pattern tables.

Every rank holds the same `Placement` (who has the newest copy of which value) and applies the same transitions to it,
so both ends of a transfer know of it without a word being sent. Per step there are two of them:

- `Exchange.settle` before a step: values that its stale reads need on a rank that has no newest copy move there. It may
  happen as soon as the step's pattern is known, which is usually right after the step before it (`settle` twice in a
  row is the same as once).
- `Exchange.advance` after a step: what it computed is newest now, where it was computed and where it was read fresh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..ir import Branch, InputError, Pattern, Segment, lower

__all__ = ["Exchange", "Flow", "Launch", "Message", "Placement", "ReadFact", "SegmentFacts", "Slot"]

Slot = tuple[Branch, str]
"""Branch and value name."""

Placement = Mapping[Slot, tuple[int, ...]]
"""Ranks that hold the newest copy of each value; the first one computed it. Never changed in place."""


class ReadFact(Protocol):
    """What the exchange needs to know of one value that a segment takes from outside."""

    @property
    def source(self) -> Slot:
        """The value."""

    @property
    def stale(self) -> bool:
        """Whether the value of an earlier step is meant."""


class SegmentFacts(Protocol):
    """What a segment reads and writes (`SegmentRunner` is one)."""

    def values_read(self, segment: Segment) -> Sequence[ReadFact]:
        """Values from outside the segment."""

    def values_written(self, segment: Segment) -> Sequence[Slot]:
        """Values that the segment renews."""


@dataclass(frozen=True)
class Message:
    """Values that travel together from one rank to another."""

    source: int
    target: int
    slots: tuple[Slot, ...]

    def __str__(self) -> str:
        return f"{self.source}->{self.target}: " + " ".join(f"{branch[0]}.{name}" for branch, name in self.slots)


@dataclass(frozen=True)
class Launch:
    """One segment of a step with the fresh values that it waits for and those it passes on."""

    segment: Segment
    stale: tuple[Slot, ...]
    """Values taken as they were when the step began."""
    fresh: tuple[Slot, ...]
    """Values of this step that it takes."""
    receives: tuple[Message, ...]
    """Messages that must have arrived on its rank before it starts."""
    sends: tuple[Message, ...]
    """Messages that leave its rank when it has finished."""


@dataclass(frozen=True)
class Flow:
    """One step of a pattern on all ranks: what does not depend on the steps before it."""

    pattern: Pattern
    launches: tuple[Launch, ...]
    written: Placement
    """Where the values that the step computes are held when it ends."""
    ranks: frozenset[int]
    """Ranks that compute something."""

    def on(self, rank: int) -> tuple[Launch, ...]:
        """The launches of one rank, in order."""
        return tuple(launch for launch in self.launches if launch.segment.rank == rank)

    def receives(self, rank: int) -> tuple[Message, ...]:
        """Fresh messages to one rank, in the order in which each sender sends them."""
        return tuple(message for launch in self.launches for message in launch.sends if message.target == rank)

    def branches(self, rank: int) -> frozenset[Branch]:
        """Branches whose inputs the rank needs."""
        return frozenset(branch for launch in self.on(rank) for branch in launch.segment.branches)


class Exchange:
    """The transitions of the placement for a set of patterns; remembers every one it has worked out."""

    def __init__(self, patterns: Iterable[Pattern], facts: SegmentFacts) -> None:
        self.flows: dict[str, Flow] = {pattern.name: _flow(pattern, facts) for pattern in patterns}
        self.start: Placement = {}
        """The placement before the first step of a generation."""
        self._known: dict[tuple[str, str, int], tuple[tuple[Message, ...], Placement]] = {}
        self._interned: dict[frozenset[tuple[Slot, tuple[int, ...]]], Placement] = {frozenset(): self.start}

    def settle(self, placement: Placement, name: str) -> tuple[tuple[Message, ...], Placement]:
        """Messages that put every stale read of pattern `name` in place, and the placement after them.

        Raises:
            InputError: a stale read of a value that no step has computed yet.
        """
        return self._transition("settle", placement, name, self._settle)

    def advance(self, placement: Placement, name: str) -> Placement:
        """The placement after a step of pattern `name`."""
        return self._transition("advance", placement, name, lambda p, f: ((), {**p, **f.written}))[1]

    def _transition(
        self, kind: str, placement: Placement, name: str,
        work_out: Callable[[Placement, Flow], tuple[tuple[Message, ...], Placement]],
    ) -> tuple[tuple[Message, ...], Placement]:
        # Placements are interned, so identity stands for equality and a step costs one dictionary look-up.
        key = (kind, name, id(placement))
        if key not in self._known:
            messages, after = work_out(placement, self.flows[name])
            self._known[key] = messages, self._interned.setdefault(frozenset(after.items()), after)
        return self._known[key]

    @staticmethod
    def _settle(placement: Placement, flow: Flow) -> tuple[tuple[Message, ...], Placement]:
        after = dict(placement)
        moving: dict[tuple[int, int], list[Slot]] = {}
        for launch in flow.launches:
            rank = launch.segment.rank
            for slot in launch.stale:
                if slot not in after:
                    raise InputError(
                        f"pattern {flow.pattern} reads {slot[1]!r} of branch {slot[0]!r} before any step computed it; "
                        "start the schedule with an exact pattern"
                    )
                if rank not in after[slot]:
                    moving.setdefault((after[slot][0], rank), []).append(slot)
                    after[slot] = (*after[slot], rank)
        return tuple(Message(*ends, tuple(slots)) for ends, slots in sorted(moving.items())), after


def _flow(pattern: Pattern, facts: SegmentFacts) -> Flow:
    segments = lower(pattern)
    writer = {slot: index for index, segment in enumerate(segments) for slot in facts.values_written(segment)}
    holders: dict[Slot, list[int]] = {slot: [segments[index].rank] for slot, index in writer.items()}
    moving: dict[tuple[int, int], list[Slot]] = {}
    reads: list[tuple[tuple[Slot, ...], tuple[Slot, ...]]] = []
    for segment in segments:
        facts_of = facts.values_read(segment)
        stale = tuple(dict.fromkeys(read.source for read in facts_of if read.stale))
        fresh = tuple(dict.fromkeys(read.source for read in facts_of if not read.stale))
        reads.append((stale, fresh))
        for slot in fresh:
            if segment.rank not in holders[slot]:
                holders[slot].append(segment.rank)
                moving.setdefault((writer[slot], segment.rank), []).append(slot)
    messages = {
        ends: Message(segments[ends[0]].rank, ends[1], tuple(slots)) for ends, slots in sorted(moving.items())
    }
    launches = tuple(
        Launch(
            segment, stale, fresh,
            receives=tuple(m for m in messages.values()
                           if m.target == segment.rank and not set(fresh).isdisjoint(m.slots)),
            sends=tuple(m for (source, _), m in messages.items() if source == index),
        )
        for index, (segment, (stale, fresh)) in enumerate(zip(segments, reads))
    )
    written = {slot: tuple(ranks) for slot, ranks in holders.items()}
    return Flow(pattern, launches, written, frozenset(s.rank for s in segments))
