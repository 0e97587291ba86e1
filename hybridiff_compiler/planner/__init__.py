"""Planning: from a profile to the best partitions, patterns and schedule. Pure: no devices, no processes, no torch.

Entry points: `candidate_partitions` and `generate_patterns` say what a profile should measure; `plan` and `frontier`
solve; `proposals` are schedules on which the profiler checks predictions; `alternating_plan` and `fewer_steps` make
the simpler schedules to compare with.
"""

from .cost import StepCost, step_cost
from .partition import candidate_partitions, linear, nested, thin
from .patterns import FAMILIES, Family, exact_patterns, family_of, generate_patterns, on_ranks
from .problem import Problem
from .proposals import proposals
from .reference import alternating_plan, alternating_steps, fewer_steps
from .schedule import Frontier, solve_frontier
from .solve import POLICIES, FrontierPoint, frontier, plan, plan_for_steps, solve_problem
from .tables import StepTable, prune_dominated, schedule_errors, step_tables

__all__ = [
    "FAMILIES", "POLICIES", "Family", "Frontier", "FrontierPoint", "Problem", "StepCost", "StepTable",
    "alternating_plan", "alternating_steps", "candidate_partitions", "exact_patterns", "family_of", "fewer_steps",
    "frontier", "generate_patterns", "linear", "nested", "on_ranks", "plan", "plan_for_steps", "proposals",
    "prune_dominated", "schedule_errors", "solve_frontier", "solve_problem", "step_cost", "step_tables", "thin",
]
