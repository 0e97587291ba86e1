"""Compile-time graph partitioning for diffusion inference on several GPUs.

    import hybridiff_compiler as hc

    profile = hc.profile(pipe, prompts=[...], num_inference_steps=50)
    plan = hc.plan(profile, gpus=2, min_psnr=30)
    with hc.parallelize(pipe, plan):
        image = pipe("a red apple").images[0]

Heavy imports happen at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .ir import HybridiffError, InputError, Plan, PlanMismatchError, Profile, TargetError, UsageError, WorkerError

if TYPE_CHECKING:
    from .api import profile, profile_costs
    from .planner import at_steps, explain, frontier, plan, plan_fleet, switched_plan
    from .quality.refine import refine_plan
    from .quality.verify import verify
    from .runtime.parallelize import parallelize

__all__ = [
    "HybridiffError", "InputError", "Plan", "PlanMismatchError", "Profile", "TargetError", "UsageError",
    "WorkerError", "at_steps", "explain", "frontier", "parallelize", "plan", "plan_fleet", "profile",
    "profile_costs", "refine_plan", "switched_plan", "verify",
]

_HOMES = {
    "at_steps": "planner", "explain": "planner", "frontier": "planner", "plan_fleet": "planner",
    "switched_plan": "planner", "parallelize": "runtime.parallelize", "plan": "planner", "profile": "api",
    "profile_costs": "api", "refine_plan": "quality.refine", "verify": "quality.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
