"""What a plan is asked for, and the point of a frontier that answers it best."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..ir import UsageError
from .fitting import Choice, Solved
from .problem import Problem
from .robust import check_quantile
from .schedule import Frontier

__all__ = ["POLICIES", "Policy", "Target"]

Policy = Literal["exact", "paper"]
POLICIES: tuple[Policy, ...] = ("exact", "paper")
_TOLERANCE = 1e-9
_LATENCY: Callable[[Solved], float] = lambda found: found.latency_s  # noqa: E731


@dataclass(frozen=True, kw_only=True)
class Target:
    """A quality, a latency, both, or a policy.

    With a quality alone the fastest schedule of it is taken, with a latency alone the one of least error; with both
    the fastest one of the quality, if it is fast enough.
    """

    min_psnr: float | None = None
    """dB, of the mean over prompts or of `quantile`."""
    speedup: float | None = None
    """Predicted, over one rank."""
    max_latency_ms: float | None = None
    """Predicted time of the denoising loop."""
    policy: str | None = None
    quantile: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be asked for.

        Raises:
            UsageError: no target, two latencies, a policy with anything else, or a number out of range.
        """
        asked = {
            "min_psnr": self.min_psnr, "speedup": self.speedup, "max_latency_ms": self.max_latency_ms,
            "policy": self.policy,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        got = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
        if not given or (self.policy is not None and len(given) > 1) or {"speedup", "max_latency_ms"} <= given.keys():
            raise UsageError(
                f"got targets: {got}; give exactly one of min_psnr, speedup, max_latency_ms and policy, or min_psnr "
                "with one of the two latencies"
            )
        if self.policy is not None and self.policy not in POLICIES:
            raise UsageError(f"got policy {self.policy!r}; choose from {', '.join(POLICIES)}")
        if self.min_psnr is not None and not math.isfinite(self.min_psnr):
            raise UsageError(f"got min_psnr={self.min_psnr}; give a number of decibels, e.g. 35, or the policy 'exact'")
        if self.speedup is not None and not (math.isfinite(self.speedup) and self.speedup > 0):
            raise UsageError(f"got speedup={self.speedup}; give a factor above 0, e.g. 3")
        if self.max_latency_ms is not None and not (math.isfinite(self.max_latency_ms) and self.max_latency_ms > 0):
            raise UsageError(f"got max_latency_ms={self.max_latency_ms}; give milliseconds above 0, e.g. 500")
        if self.quantile is not None:
            check_quantile(self.quantile)
            if self.min_psnr is None:
                raise UsageError(
                    f"got quantile={self.quantile:g} without min_psnr; a quantile says for which share of prompts the "
                    "quality may be lower"
                )

    def __str__(self) -> str:
        words = {
            "min_psnr": self.min_psnr, "quantile": self.quantile, "speedup": self.speedup,
            "max_latency_ms": self.max_latency_ms, "policy": self.policy,
        }
        return " ".join(
            f"{name}={value:g}" if isinstance(value, float | int) else f"{name}={value}"
            for name, value in words.items() if value is not None
        )

    def budget_s(self, problem: Problem) -> float | None:
        """Longest latency in seconds; None where none was asked for."""
        if self.speedup is not None:
            return problem.single_s / self.speedup
        return None if self.max_latency_ms is None else self.max_latency_ms / 1e3

    def needed_db(self, problem: Problem) -> float | None:
        """What `Problem.judged_db` must reach: the target and what is kept in reserve; None where no quality was
        asked for."""
        return None if self.min_psnr is None else self.min_psnr + problem.reserve_db(self.quantile)

    def choose(self, problem: Problem, solved: Frontier) -> int | None:
        """The point to take; None when there is none."""
        if self.min_psnr is None:
            return self._best(problem, solved)
        point = self._fastest(problem, solved)
        return point if self._is_quick(problem, float(solved.latency_s[point])) else None

    @property
    def choice(self) -> Choice:
        """`choose`, and what it minimises."""
        return Choice(self.choose, (lambda found: found.error) if self.min_psnr is None else _LATENCY)

    def refusal(self, problem: Problem, answer: Callable[[Choice], Solved | None]) -> str:
        """Why there is no point to take, with the nearest ones.

        Args:
            problem: the candidates.
            answer: of a question to their frontier; there is one whatever the latency.
        """
        fastest = answer(Choice(lambda problem, solved: 0, _LATENCY))
        assert fastest is not None, "a frontier has a first point"
        if not self._is_quick(problem, fastest.latency_s):
            return self._too_fast(problem, fastest)
        best = answer(Choice(self._best, lambda found: found.error))
        good = answer(Choice(self._fastest, _LATENCY))
        assert best is not None, "the fastest is quick enough"
        assert good is not None, "the exact schedule always is"
        reached = problem.judged_db(best.error, self.quantile) - problem.reserve_db(self.quantile)
        within = self._within(problem)
        return (
            f"no schedule on {_gpus(problem)} is predicted to reach {self.min_psnr:g} dB {within}; the nearest are "
            f"{_down(reached)} dB {within}, and {self.min_psnr:g} dB at "
            f"{_down(problem.single_s / good.latency_s, 2)}x ({_ms(good.latency_s)} ms); lower one of the two or allow "
            "more patterns"
        )

    def _is_quick(self, problem: Problem, latency_s: float) -> bool:
        budget = self.budget_s(problem)
        return budget is None or latency_s <= budget * (1 + _TOLERANCE)

    def _best(self, problem: Problem, solved: Frontier) -> int | None:
        quick = [i for i in range(len(solved)) if self._is_quick(problem, float(solved.latency_s[i]))]
        return quick[-1] if quick else None

    def _fastest(self, problem: Problem, solved: Frontier) -> int:
        needed = self.needed_db(problem)
        assert needed is not None, "asked for a quality"
        judged = (problem.judged_db(float(error), self.quantile) for error in solved.error)
        return next(i for i, db in enumerate(judged) if db >= needed - _TOLERANCE)  # the exact schedule always is

    def _within(self, problem: Problem) -> str:
        return f"at {self.speedup:g}x" if self.speedup is not None else f"in {self.max_latency_ms:g} ms"

    def _too_fast(self, problem: Problem, fastest: Solved) -> str:
        psnr = problem.psnr_db(fastest.error)
        quality = "exactly" if math.isinf(psnr) else f"at {psnr:.1f} dB"
        if self.speedup is not None:
            return (
                f"no schedule on {_gpus(problem)} is predicted to be {self.speedup:g}x as fast as one; the fastest "
                f"reaches {_down(problem.single_s / fastest.latency_s, 2)}x {quality}; ask for less or allow more "
                "patterns"
            )
        return (
            f"no schedule on {_gpus(problem)} is predicted to take {self.max_latency_ms:g} ms or less; the fastest "
            f"takes {_ms(fastest.latency_s)} ms {quality}; ask for more or allow more patterns"
        )


def _gpus(problem: Problem) -> str:
    return f"{problem.gpus} GPU{'s' if problem.gpus > 1 else ''}"


def _down(value: float, digits: int = 1) -> str:
    """Rounded so that asking for it succeeds."""
    return f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}"


def _ms(seconds: float) -> str:
    return f"{math.ceil(seconds * 1e5) / 1e2:.2f}"
