"""Schedules improved by measurement."""

from __future__ import annotations

from planner.profiles import make_profile

from hybridiff_compiler.quality.equal_cost import EqualCostRow, Judge
from hybridiff_compiler.quality.refine import refine


class Pretended(Judge):
    """Quality is how early the exact steps come."""

    def measure(self, row: EqualCostRow) -> list[float]:
        return [-float(sum(i for i, name in enumerate(row.steps) if name == self.exact))]


def test_a_climb_keeps_the_cost_and_finds_what_is_better() -> None:
    judge = Pretended(None, make_profile(num_steps=12, max_age=3, depth=4))
    start = judge.row("start", 4.0, ("branch", "reuse", "reuse", "branch", *("reuse",) * 4, "branch", *("reuse",) * 2,
                                     "branch"))
    reports = []
    found = refine(
        judge, start, patterns=["reuse", "trend"], tries=150, seed=1, on_progress=lambda *each: reports.append(each)
    )
    assert found.psnr_db == -(0 + 1 + 2 + 11)
    assert found.work_speedup >= start.work_speedup - 1e-9
    assert found.steps[0] == found.steps[-1] == "branch"
    assert [best for *_, best in reports] == sorted(best for *_, best in reports)
