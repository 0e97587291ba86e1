"""Exact partitioners: where to divide a denoiser's layers so that the slowest rank is as fast as possible.

`linear` cuts the layer order into contiguous stages; `nested` takes an inner run out of it, which for a U-Net follows
its symmetry and so cuts far fewer bytes (`rings` does so for more stages); `thin` is nested with a cheap outer stage,
for patterns that reuse the inner one. Stages of a nested split feed each other in both directions: only stale edges
make it schedulable.

Stale values are one step old, so among splits of nearly the same time those are preferred that lose least by it: fewest
bytes, and where a profile has measured how much every value changes from step to step, fewest bytes times change.
Measured one-step errors (`tools/check_redundancy.py`) bear that out on the U-Net for what the estimate's stage reads in
a nested split (rank correlation 0.4 over 42 cuts; 0.15 with bytes, -0.2 with the mean change); on the MMDiT they do not
(-0.1 over 6 cuts), but the choice is that of fewest bytes. Where a linear split is cut has no influence on them: its
last stage reads all it needs from the step before, and so repeats that step's estimate. So no more time is given up
there than measurements could tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..ir import InputError, LayerGraph, Link, Partition, UsageError
from .crossing import bytes_in, bytes_out, change_weights, live_seconds, lost_across
from .divide import any_order_is_searchable, divide
from .layer_times import check_costs, check_slack, inner_runs
from .recompute import recompute_shared
from .rings import rings
from .run_costs import Worker
from .steady import steadiest_cuts
from .worlds import stage_counts

__all__ = ["candidate_partitions", "linear", "nested", "thin"]

BALANCE_SLACK = 0.05
"""How much slower than the best balance `candidate_partitions` lets a nested split be for the sake of fewer bytes, or
of fewer bytes times change. The bundled models' cuts within it differ by 1.3 to 1.6 dB in their one-step error."""
UNMOVED = 0.01
"""The same for linear splits where changes are known: measured times cannot tell such cuts apart (the profiler does not
count a cut as moved by less), and their errors are equal anyway."""
THIN_SHARE = 0.25
"""Share of the denoiser's time that `candidate_partitions` gives the outer stage of the thin split."""
THIN_SLACK = 0.25
"""How far under that share it may fall for the sake of fewer bytes."""


def linear(
    graph: LayerGraph, costs: Sequence[float], stages: int = 2, link: Link | None = None, *, slack: float = 0.0,
    change: Mapping[str, float] | None = None, name: str = "linear",
) -> Partition:
    """Contiguous stages whose slowest one is as fast as possible.

    Objective: minimise the largest stage time, a stage's time being the seconds of its layers plus, with `link`, the
    time to receive every value produced before the stage and read in it (each once). The output layer is in the
    last stage. Among optima, the one with the earliest cuts. With `change`, the relative change of every value from
    step to step, stages up to `1 + slack` times slower than that count as equally fast, and among them the least sum
    over stages of the bytes that they receive, weighed by their change (`change_weights`), decides first.

    Algorithm: dynamic programming over (number of stages, end of the last one), `T[k, b] = min over a of
    max(T[k-1, a], time[a, b))`; exact because a stage's time depends on its two borders only. O(stages * layers^2)
    after O(consumers + layers^2) for the bytes. This is PipeDream's recurrence without replication (Narayanan et al.,
    SOSP 2019, section 3.1). The second choice is one more such program (`steadiest_cuts`).

    Raises:
        UsageError: `stages` is below 1, `slack` is negative, or `costs` or `change` does not fit the graph.
        InputError: the graph has too few layers for so many stages.
    """
    seconds = check_costs(graph, costs)
    check_slack(slack)
    size, last = len(seconds), graph.names.index(graph.output)
    if stages < 1:
        raise UsageError(f"got {stages} stages; a partition has 1 or more")
    if stages > last + 1:
        raise InputError(
            f"{size} layers with the output at position {last} cannot make {stages} contiguous stages; "
            f"ask for at most {last + 1}"
        )
    begin = np.concatenate([[0.0], np.cumsum(seconds)])
    times = begin[None, :] - begin[:, None] + _transfer(bytes_in(graph), link)
    best = np.full((stages + 1, size + 1), np.inf)
    origin = np.zeros((stages + 1, size + 1), dtype=int)
    best[0, 0] = 0.0
    for stage in range(1, stages + 1):
        for end in range(stage, size + 1 if stage == stages else last + 1):
            start_limit = min(end, last + 1)
            slowest = np.maximum(best[stage - 1, :start_limit], times[:start_limit, end])
            origin[stage, end] = int(np.argmin(slowest))
            best[stage, end] = slowest[origin[stage, end]]
    cuts = [size]
    for stage in range(stages, 0, -1):
        cuts.append(int(origin[stage, cuts[-1]]))
    cuts.reverse()
    if change is not None:
        loss = bytes_in(graph, weights=change_weights(graph, change))
        cuts = steadiest_cuts([times] * stages, [loss] * stages, float(best[stages, size]) * (1 + slack), last)
    return Partition(name=name, stages=tuple(graph.names[a:b] for a, b in pairwise(cuts)))


def nested(
    graph: LayerGraph, costs: Sequence[float], link: Link | None = None, *, slack: float = 0.0,
    change: Mapping[str, float] | None = None, name: str = "nested",
) -> Partition:
    """An inner run (stage 0) and everything around it (stage 1), as evenly divided as possible.

    Objective: minimise `max(inner, outer)`, each being the seconds of its layers plus, with `link`, the time to receive
    the values that it reads from the other. Runs within `1 + slack` of that minimum count as equal; among them fewest
    bytes crossing (both directions), which with `change`, the relative change of every value from step to step, are
    weighed by how much the estimate loses when it reads them one step old (`lost_across`); then the most central run
    (smallest difference between the time before and after it), then the earliest and shortest. Candidates are the runs
    without the output layer and, where such runs exist, without a layer that reads nothing from other layers: those
    read the denoiser's inputs, which the stage that makes the estimate should see fresh.

    Algorithm: enumeration of all O(layers^2) runs on whole arrays, O(consumers + layers^2) in all.

    Raises:
        UsageError: `costs` or `change` does not fit the graph, or `slack` is negative.
        InputError: the graph has fewer than two layers.
    """
    runs = _Runs(graph, costs, link, change)
    slowest = np.maximum(runs.inner + runs.inward, runs.outer + runs.outward)
    slowest[~runs.allowed] = np.inf
    return runs.choose(slowest <= slowest.min() * (1 + check_slack(slack)), name)


def thin(
    graph: LayerGraph, costs: Sequence[float], share: float = THIN_SHARE, *, slack: float = 0.0,
    change: Mapping[str, float] | None = None, name: str = "thin",
) -> Partition:
    """An inner run (stage 0) whose surroundings (stage 1) take at most `share` of the denoiser's time.

    Objective: maximise the *live* outer time subject to `outer <= share * total`. Live are the outer layers that reach
    the output without passing through the inner run: with the inner stage reused, they alone bring something new into
    the estimate. (In a U-Net the way down is live through its skip connections; in a plain chain of blocks only what
    follows the run is.) Runs with at least `1 - slack` of that maximum count as equal; ties are broken as in `nested`,
    whose candidates hold here too. Communication is left out: the pattern that this split is for (`branch-reuse`) moves
    no activations.

    Algorithm: enumeration as in `nested`; the live times cost O(edges x layers^2) bit operations.

    Raises:
        UsageError: `costs` or `change` does not fit the graph, `slack` is negative, or `share` is not between 0 and 1.
        InputError: no run leaves so little; the message says how little is possible.
    """
    if not 0 < share < 1:
        raise UsageError(f"got share {share:g}; the outer stage takes more than 0 and less than 1 of the time")
    runs = _Runs(graph, costs, None, change)
    outer = np.where(runs.allowed, runs.outer, np.inf)
    total = runs.total
    fits = outer <= share * total * (1 + 1e-12)
    if not fits.any():
        raise InputError(
            f"every inner run leaves at least {outer.min() / total:.0%} of the time outside, more than the {share:.0%} "
            "asked for; ask for a larger share"
        )
    live = live_seconds(graph, check_costs(graph, costs))
    return runs.choose(fits & (live >= live[fits].max() * (1 - check_slack(slack)) * (1 - 1e-12)), name)


def candidate_partitions(
    graph: LayerGraph, costs: Sequence[float], gpus: int | Iterable[int] = 2, *, link: Link | None = None,
    workers: Sequence[Worker] | None = None, change: Mapping[str, float] | None = None,
) -> tuple[Partition, ...]:
    """The partitions worth measuring for these numbers of GPUs: `linear`, `nested`, `thin`, `linear4`, `nested4`, ...

    The first three have two stages, the others as many as `stage_counts` names. Stage 0 is the front or inner one, the
    last stage holds the output. Each distinct partition comes once, under its first name; a split that the graph does
    not allow is left out, so a graph of one layer has no candidates. With a `link`, stages recompute cheap shared
    layers whose values take longer to arrive over it (`recompute_shared`). With `workers` that differ, partitions of
    as many stages suit their speeds and memories (`divide`, over the best order where that can be searched; `rings`,
    the fastest inside). With `change`, the relative change of every value from step to step, of splits that are about
    as fast those are taken whose values lose least when read one step old.

    Raises:
        UsageError: `costs` or `change` does not fit the graph, or a number of GPUs is out of range.
    """
    check_costs(graph, costs)
    if change is not None:
        change_weights(graph, change)
    steady = partial(linear, graph, costs, slack=UNMOVED, change=change)
    makers: list[Callable[[], Partition]] = [
        steady,
        partial(nested, graph, costs, slack=BALANCE_SLACK, change=change),
        partial(thin, graph, costs, slack=THIN_SLACK, change=change),
    ]
    worlds = (gpus,) if isinstance(gpus, int) else tuple(gpus)
    for stages in sorted({count for world in worlds for count in stage_counts(world)} - {2}):
        if workers is not None and len(workers) == stages and len(set(workers)) > 1:
            fastest = sorted(workers, key=lambda worker: -worker.speed)
            makers.append(partial(_unequal, graph, costs, workers, change, f"linear{stages}"))
            makers.append(partial(rings, graph, costs, stages, workers=fastest, slack=BALANCE_SLACK, change=change))
        else:
            makers.append(partial(steady, stages, name=f"linear{stages}"))
            makers.append(partial(rings, graph, costs, stages, slack=BALANCE_SLACK, change=change))
    found: dict[tuple[tuple[str, ...], ...], Partition] = {}
    for make in makers:
        try:
            partition = make()
        except UsageError:
            raise
        except InputError:
            continue  # too few layers for this split
        if link is not None:
            partition = recompute_shared(graph, costs, partition, link)
        found.setdefault(partition.stages, partition)
    return tuple(found.values())


def _unequal(
    graph: LayerGraph, costs: Sequence[float], workers: Sequence[Worker], change: Mapping[str, float] | None, name: str
) -> Partition:
    bare = [Worker(speed=worker.speed, memory_bytes=worker.memory_bytes) for worker in workers]
    search = any_order_is_searchable(len(graph.layers), bare)
    return divide(
        graph, costs, bare, any_order=search, recompute=False, slack=UNMOVED, change=change, name=name
    ).partition


class _Runs:
    """Times and bytes of every inner run `[i, j)`, as arrays indexed by its two borders."""

    def __init__(
        self, graph: LayerGraph, costs: Sequence[float], link: Link | None, change: Mapping[str, float] | None
    ) -> None:
        seconds = check_costs(graph, costs)
        size = len(seconds)
        if size < 2:
            raise InputError(f"a graph of {size} layer cannot be divided; a nested split takes 2 layers or more")
        begin = np.concatenate([[0.0], np.cumsum(seconds)])
        self.names = graph.names
        self.total = float(begin[-1])
        self.inner = begin[None, :] - begin[:, None]
        self.outer = self.total - self.inner
        self.inward, self.outward = _transfer(bytes_in(graph), link), _transfer(bytes_out(graph), link)
        self.crossing = lost_across(graph, change)
        self.off_centre = np.abs(begin[:, None] - (self.total - begin[None, :]))
        strict, loose = inner_runs(graph)
        self.allowed = strict if strict.any() else loose

    def choose(self, tied: NDArray[np.bool_], name: str) -> Partition:
        """The best of the `tied` runs: least lost, most central, earliest, shortest."""
        start, end = np.nonzero(tied & self.allowed)
        off_centre = np.round(self.off_centre[start, end] / max(self.total, 1e-300), 9)
        order = np.lexsort((end, start, off_centre, self.crossing[start, end]))
        i, j = int(start[order[0]]), int(end[order[0]])
        return Partition(name=name, stages=(self.names[i:j], self.names[:i] + self.names[j:]))


def _transfer(nbytes: NDArray[np.int64], link: Link | None) -> NDArray[np.float64]:
    if link is None:
        return np.zeros(nbytes.shape)
    return np.where(nbytes > 0, link.latency_s + nbytes / link.bytes_per_s, 0.0)

