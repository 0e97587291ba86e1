"""Lower bounds on what any schedule can reach, and the schedules on the lower convex hull of the frontier.

With a price per unit of error, `min latency + price * error` over all schedules is an ordinary shortest path over
(step, state): no labels, so memory does not grow with the resolution in time, and the whole age automaton can be
searched. It is the Lagrangian relaxation of the resource-constrained shortest path (Handler & Zang, 1980, "A dual
algorithm for the constrained shortest path problem", Networks 10): for every price, `phi(price) - price * E` bounds
the latency of every schedule of error E or less from below, and the cutting-plane search of that paper finds the best
price. The schedules met on the way are the *supported* Pareto points.

One price takes O(steps x states x patterns); several prices are solved together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .states import StateSpace, state_space
from .tables import StepTable, schedule_errors

__all__ = ["Bound", "Point", "Pricing"]

STATE_CELLS = 20_000_000
"""Steps x patterns x states that one price may touch; automata beyond that are relaxed."""
_TOGETHER = 32
_TOLERANCE = 1e-12


@dataclass(frozen=True, eq=False)
class Point:
    """A schedule: indices into the tables, and what it costs."""

    latency_s: float
    error: float
    choices: NDArray[np.int16]


@dataclass(frozen=True)
class Bound:
    """A lower bound and what was searched for it."""

    value: float
    states: int
    relaxed: bool
    """Whether ages were relaxed (to the optimistic side): the bound still holds, but may be loose."""


class Pricing:
    """Shortest paths over the age automaton of `tables`, one of which is exact."""

    def __init__(
        self, tables: Sequence[StepTable], num_steps: int, *, exact_head: int = 1, exact_tail: int = 1,
        space: StateSpace | None = None, cells: int = STATE_CELLS,
    ) -> None:
        """
        Args:
            tables: candidates, exactly one exact.
            num_steps: steps of a generation.
            exact_head, exact_tail: first and last steps that must be exact.
            space: an automaton over `tables`; default: all ages, or relaxed ones where they are too many.
            cells: see `STATE_CELLS`.
        """
        self._num_steps, self._head, self._tail = num_steps, exact_head, exact_tail
        self.relaxed = False
        if space is None:
            limit = max(256, cells // (num_steps * len(tables)))
            space = state_space(tables, limit=limit)
            if space is None:
                self.relaxed, tables = True, [_relaxed(tables, index) for index in range(len(tables))]
                space = state_space(tables)
        assert space is not None, "a relaxed automaton is small"
        self.space, self._tables = space, tuple(tables)
        self._latency = np.array([table.latency_s for table in tables])
        self._exact = next(p for p, table in enumerate(tables) if table.pattern.is_exact)
        self._cheap = [p for p in range(len(tables)) if p != self._exact]
        self._target = self.space.target.astype(np.int64)
        self._errors = np.stack([space.errors(tables, step) for step in range(num_steps)])

    def solve(self, prices: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.int16]]:
        """Least `latency + price * error` of every price (`phi`), and a schedule per price that reaches it."""
        phi, choices = [], []
        for start in range(0, len(prices), _TOGETHER):
            values, schedules = self._solve(np.asarray(prices[start : start + _TOGETHER], dtype=float))
            phi.append(values)
            choices.append(schedules)
        return np.concatenate(phi), np.concatenate(choices)

    def point(self, choices: NDArray[np.int16]) -> Point:
        """A schedule with its latency and error."""
        error = float(schedule_errors(self._tables, choices[None, :])[0])
        return Point(float(self._latency[choices].sum()), error, choices)

    def ends(self) -> tuple[Point, Point]:
        """The fastest schedule (least error among those of a vanishing price) and the exact one."""
        exact = self.point(np.full(self._num_steps, self._exact, dtype=np.int16))
        tiny = 1e-9 * max(float(self._latency.min()), 1e-12)
        return self.point(self.solve([tiny])[1][0]), exact

    def hull(self, prices: int) -> list[Point]:
        """Supported points, fastest first: all of them, or as many as `prices` shortest paths find."""
        fastest, exact = self.ends()
        points, open_between, spent = [fastest, exact], [(fastest, exact)], 1
        while open_between and spent < prices:
            batch = [pair for pair in open_between if _slope(*pair) is not None][: max(1, prices - spent)]
            if not batch:
                break
            rest = open_between[len(batch) :] if len(batch) < len(open_between) else []
            slopes = [_slope(*pair) or 0.0 for pair in batch]
            phi, choices = self.solve(slopes)
            spent += len(batch)
            open_between = list(rest)
            for (fast, slow), slope, value, schedule in zip(batch, slopes, phi, choices):
                line = slow.latency_s + slope * slow.error
                if value < line - _TOLERANCE * max(1.0, abs(line)):
                    found = self.point(schedule)
                    points.append(found)
                    open_between += [(fast, found), (found, slow)]
        kept: list[Point] = []
        for point in sorted(points, key=lambda point: (point.latency_s, point.error)):
            if not kept or point.error < kept[-1].error:
                kept.append(point)
        return kept

    def least_latency(self, error: float, rounds: int = 40) -> Bound:
        """No schedule of at most `error` (summed) is faster than this, in seconds."""
        fast, slow = self.ends()
        best = fast.latency_s
        if fast.error > error:
            for _ in range(rounds):
                slope = _slope(fast, slow)
                if slope is None:
                    break
                value, found, line = self._cut(slope, slow)
                best = max(best, value - slope * error)
                if value >= line - _TOLERANCE * max(1.0, abs(line)):
                    break
                fast, slow = (fast, found) if found.error <= error else (found, slow)
        return Bound(best, len(self.space), self.relaxed)

    def least_error(self, latency_s: float, rounds: int = 40) -> Bound:
        """No schedule of at most `latency_s` has a smaller summed error than this."""
        fast, slow = self.ends()
        best = 0.0
        if slow.latency_s > latency_s:
            for _ in range(rounds):
                slope = _slope(fast, slow)
                if slope is None or slope <= 0:
                    break
                value, found, line = self._cut(slope, slow)
                best = max(best, (value - latency_s) / slope)
                if value >= line - _TOLERANCE * max(1.0, abs(line)):
                    break
                fast, slow = (found, slow) if found.latency_s <= latency_s else (fast, found)
        return Bound(best, len(self.space), self.relaxed)

    def _cut(self, slope: float, slow: Point) -> tuple[float, Point, float]:
        phi, choices = self.solve([slope])
        return float(phi[0]), self.point(choices[0]), slow.latency_s + slope * slow.error

    def _solve(self, prices: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int16]]:
        """Backwards over the steps: `costs[step][state, price]` of the best way to run the steps from `step` on."""
        shape, steps = (len(self.space), len(prices)), self._num_steps
        costs: list[NDArray[np.float64]] = [np.zeros(shape)]
        candidate, priced = np.empty(shape), np.empty(shape)
        for step in range(steps - 1, 0, -1):
            later = costs[-1]
            best = self._latency[self._exact] + later[self._target[self._exact]]
            if self._head <= step < steps - self._tail:
                for p in self._cheap:
                    np.multiply.outer(self._errors[step, p], prices, out=priced)
                    np.take(later, self._target[p], axis=0, out=candidate, mode="clip")
                    candidate += self._latency[p]
                    candidate += priced
                    np.minimum(best, candidate, out=best)
            costs.append(best)
        costs.reverse()
        return self._latency[self._exact] + costs[0][0], self._trace(prices, costs)

    def _trace(self, prices: NDArray[np.float64], costs: list[NDArray[np.float64]]) -> NDArray[np.int16]:
        """Per price the schedule whose cost is `costs[0][0]`; exact steps where they are as good."""
        schedules = np.full((len(prices), self._num_steps), self._exact, dtype=np.int16)
        columns, state = np.arange(len(prices)), np.zeros(len(prices), dtype=np.int64)
        for step in range(1, self._num_steps):
            if not self._head <= step < self._num_steps - self._tail:
                state = self._target[self._exact, state]
                continue
            after = np.where(self._target[:, state] < 0, 0, self._target[:, state])
            total = costs[step][after, columns] + self._latency[:, None]
            for p in self._cheap:
                total[p] += self._errors[step, p, state] * prices
            total[self._exact] = np.nextafter(total[self._exact], -np.inf)
            schedules[:, step] = total.argmin(axis=0)
            state = after[schedules[:, step], columns].astype(np.int64)
        return schedules


def _slope(fast: Point, slow: Point) -> float | None:
    """Seconds per unit of error between two points; None when they are the same in one of the two."""
    if slow.error >= fast.error or slow.latency_s <= fast.latency_s:
        return None
    return (slow.latency_s - fast.latency_s) / (fast.error - slow.error)


def _relaxed(tables: Sequence[StepTable], index: int) -> StepTable:
    """Table `index` without the age of stale activations: at every step the least error over ages."""
    table = tables[index]
    if table.activations is None:
        return table
    least = table.activations.min(axis=1)
    return replace(table, activations=None, base=least if table.base is None else table.base + least)
