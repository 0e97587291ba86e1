"""Two GPUs with workers of their own for every test: compiled graphs."""

from __future__ import annotations

from collections.abc import Callable

from hybridiff_compiler.runtime.parallelize import parallelize

from .conftest import GpuModel


def test_compiled_graphs(model: GpuModel, check: Callable[..., None]) -> None:
    tables = {name: model.plan.pattern(name) for name in ("branch", "paper", "branch-reuse")}
    fields = dict(model.plan) | {"patterns": tuple(tables.values())}
    plan = type(model.plan)(**fields).with_steps(("branch", "paper", "paper", "branch-reuse") * 2)
    with parallelize(model.pipe, plan):
        check(model("a red apple"), model.simulate(plan, "a red apple", "inductor"), "compiled")
        check(model("a red apple"), model.simulate(plan, "a red apple", "eager"), "compiled against eager")
