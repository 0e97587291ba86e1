"""Planning: from a profile to the best partitions, patterns and schedule. Pure: no devices, no processes, no torch.

Entry points: `candidate_partitions` and `generate_patterns` say what a profile should measure; `plan` and `frontier`
solve; `at_steps` makes a profile for another number of steps; `proposals` are schedules on which the profiler checks
predictions; `alternating_plan` and `fewer_steps` make the simpler schedules to compare with.
"""

from .cost import CostModel, StepCost, step_cost
from .divide import Division, divide
from .explain import CheapRun, Explanation, Trade, explain
from .fleet import OBJECTIVES, Fleet, FleetOption, plan_fleet
from .memory import RankMemory, plan_memory, predicted_peaks
from .partition import candidate_partitions, linear, nested, thin
from .patterns import (
    FAMILIES,
    Family,
    exact_patterns,
    family_of,
    generate_patterns,
    measured_patterns,
    rank_free,
)
from .placement import on_ranks, placements
from .problem import Problem
from .proposals import proposals
from .queueing import Queue, simulate_queue
from .recompute import recompute_shared
from .reference import alternating_plan, alternating_steps, fewer_steps
from .rescale import at_steps, noise_levels_of
from .rings import rings
from .run_costs import RunCosts, Worker, shared_layers
from .schedule import Frontier, solve_frontier
from .solve import COSTS, FrontierPoint, frontier, plan, plan_for_steps, solve_problem
from .switching import PromptSamples, switched_plan
from .tables import StepTable, prune_dominated, schedule_errors, step_tables
from .target import POLICIES, Target
from .work import in_work_units, step_work, work_speedup
from .worlds import MAX_GPUS, stage_counts

__all__ = [
    "COSTS", "FAMILIES", "MAX_GPUS", "OBJECTIVES", "POLICIES", "CheapRun", "CostModel", "Division", "Explanation",
    "Family", "Fleet", "FleetOption", "Frontier", "FrontierPoint", "Problem", "PromptSamples", "Queue", "RankMemory",
    "RunCosts", "StepCost", "StepTable", "Target", "Trade", "Worker", "alternating_plan", "alternating_steps",
    "at_steps", "candidate_partitions", "divide", "exact_patterns", "explain", "family_of", "fewer_steps", "frontier",
    "generate_patterns", "in_work_units", "linear", "measured_patterns", "nested", "noise_levels_of", "on_ranks",
    "placements", "plan", "plan_fleet", "plan_for_steps", "plan_memory", "predicted_peaks", "proposals",
    "prune_dominated", "rank_free", "recompute_shared", "rings", "schedule_errors", "shared_layers", "simulate_queue",
    "solve_frontier", "solve_problem", "stage_counts", "step_cost", "step_tables", "step_work", "switched_plan",
    "thin", "work_speedup",
]
