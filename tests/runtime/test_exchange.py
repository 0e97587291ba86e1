"""Which values move when: the transition functions alone, against a brute-force model of copies and versions."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from hybridiff_compiler.ir import BRANCHES, InputError, Pattern, Segment, lower
from hybridiff_compiler.runtime.exchange import Exchange, Slot

from .tiny import FOUR_RANKS, TWO_RANKS


@dataclass(frozen=True)
class Read:
    source: Slot
    stale: bool


class Facts:
    """Every stage `s` of a partition produces one value `<partition>.<s>` that all the other stages read.

    Exact steps run on the whole denoiser and so write the values of all partitions.
    """

    def __init__(self) -> None:
        self.partitions = {"nested": 2, "linear": 2}

    def values_read(self, segment: Segment) -> list[Read]:
        return [
            Read((read.branch, f"{segment.partition}.{read.stage}"), read.stale)
            for reads in segment.reads for read in reads
        ]

    def values_written(self, segment: Segment) -> list[Slot]:
        stages = {segment.partition: segment.stages}
        if segment.partition == "whole":
            stages = {name: tuple(range(count)) for name, count in self.partitions.items()}
        return [(b, f"{p}.{s}") for b in segment.branches for p in stages for s in stages[p]]


def parse(tables) -> list[Pattern]:
    return [Pattern.parse(n, t, partition=p, stages=1 if p == "whole" else 2) for n, t, p in tables]


def test_paper_pattern_moves_one_value_each_way() -> None:
    exchange = Exchange(parse(TWO_RANKS), Facts())
    placement = exchange.advance(exchange.start, "branch")
    messages, placement = exchange.settle(placement, "paper")
    # rank 0 holds u, rank 1 holds c: u0 reads c1, c1 reads u0
    assert [str(m) for m in messages] == ["0->1: u.nested.0", "1->0: c.nested.1"]
    placement = exchange.advance(placement, "paper")
    again, _ = exchange.settle(placement, "paper")
    assert [str(m) for m in again] == [str(m) for m in messages]


def test_branch_reuse_after_branch_moves_nothing() -> None:
    exchange = Exchange(parse(TWO_RANKS), Facts())
    placement = exchange.advance(exchange.start, "branch")
    for _ in range(3):
        messages, placement = exchange.settle(placement, "branch-reuse")
        assert messages == ()
        placement = exchange.advance(placement, "branch-reuse")


def test_reused_values_cross_only_once() -> None:
    exchange = Exchange(parse(TWO_RANKS), Facts())
    placement = exchange.advance(exchange.start, "swapped")
    counts = []
    for _ in range(3):
        messages, placement = exchange.settle(placement, "branch-reuse")
        counts.append(sum(len(m.slots) for m in messages))
        placement = exchange.advance(placement, "branch-reuse")
    assert counts == [2, 0, 0]


def test_settling_twice_is_settling_once() -> None:
    exchange = Exchange(parse(TWO_RANKS), Facts())
    placement = exchange.advance(exchange.start, "branch")
    for name in ("paper", "pipe", "moved"):
        messages, settled = exchange.settle(placement, name)
        assert messages
        assert exchange.settle(settled, name) == ((), settled)


def test_fresh_values_leave_with_their_producer() -> None:
    exchange = Exchange(parse(TWO_RANKS), Facts())
    first, second = exchange.flows["fresh-linear"].launches
    assert (first.segment.rank, second.segment.rank) == (1, 0)
    assert first.sends == second.receives
    assert [str(m) for m in first.sends] == ["1->0: c.linear.0"]
    assert exchange.flows["fresh-linear"].receives(0) == first.sends


def test_reading_what_was_never_computed_is_refused() -> None:
    exchange = Exchange(parse(TWO_RANKS), Facts())
    with pytest.raises(InputError, match="before any step computed it"):
        exchange.settle(exchange.start, "paper")


@pytest.mark.parametrize("tables", [TWO_RANKS, FOUR_RANKS], ids=["two", "four"])
def test_random_schedules_always_find_the_right_version(tables) -> None:
    patterns = {p.name: p for p in parse(tables) if p.units}
    facts = Facts()
    exchange = Exchange(patterns.values(), facts)
    rng = random.Random(7)
    for _ in range(60):
        names = ["branch", *rng.choices(list(patterns), k=12)]
        newest: dict[Slot, int] = {}
        held: dict[int, dict[Slot, int]] = {rank: {} for rank in range(4)}
        placement = exchange.start
        for step, name in enumerate(names):
            messages, placement = exchange.settle(placement, name)
            for message in messages:
                for slot in message.slots:
                    held[message.target][slot] = held[message.source][slot]
            fresh: dict[int, dict[Slot, int]] = {rank: {} for rank in range(4)}
            for launch, segment in zip(exchange.flows[name].launches, lower(patterns[name]), strict=True):
                assert launch.segment == segment
                for slot in launch.stale:
                    assert held[segment.rank][slot] == newest[slot] < step
                for slot in launch.fresh:
                    assert fresh[segment.rank][slot] == step
                fresh[segment.rank].update(dict.fromkeys(facts.values_written(segment), step))
                for message in launch.sends:
                    fresh[message.target].update((slot, fresh[message.source][slot]) for slot in message.slots)
            for rank, values in fresh.items():
                held[rank].update(values)
                newest.update(values)
            placement = exchange.advance(placement, name)
        assert all(branch in BRANCHES for branch, _ in placement)
    assert len(exchange._known) < 2000  # states are few, so a step is a look-up
