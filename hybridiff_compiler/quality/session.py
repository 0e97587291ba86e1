"""One set of worker processes for several plans.

Workers hold tables and no schedule: they do what the driver orders step by step. So plans over the same tables can
take turns on the same workers, which saves starting them for every row of a comparison.
"""

from __future__ import annotations

from typing import Any

from ..ir import InputError, Plan
from ..runtime.parallelize import ParallelPipeline
from ..runtime.schedule_state import ScheduleState

__all__ = ["SharedWorkers"]


class SharedWorkers(ParallelPipeline):
    """A pipeline running by a plan that can be exchanged for another one over the same tables."""

    def __init__(self, pipe: Any, tables: Plan, *, threads: int | None, timeout_s: float = 60.0) -> None:
        """
        Args:
            pipe: see `parallelize`.
            tables: knows every pattern that will be used (`all_tables`).
            threads: CPU threads per rank.
            timeout_s: see `parallelize`.
        """
        super().__init__(pipe, tables, devices=None, timeout_s=timeout_s, threads=threads, backend="eager")
        self._tables = tables

    def use(self, plan: Plan) -> None:
        """Run the next generations by `plan`.

        Raises:
            InputError: it has a table that the workers do not know, or is for another model.
        """
        known = set(self._tables.patterns)
        unknown = [pattern.name for pattern in plan.patterns if pattern not in known]
        if unknown or plan.model != self._tables.model:
            raise InputError(f"the workers were started without the tables {unknown} of {plan.model.name}; start them "
                             "with every plan that will be used")
        self.plan = self._driver.plan = plan
        self._driver._schedule = ScheduleState(plan.schedule)
