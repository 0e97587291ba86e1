"""The data that every other package agrees on: layer graphs, partitions, patterns, schedules, plans and profiles.

Knows nothing of the rest of the package and imports neither torch nor diffusers.
"""

from .ages import NEVER, AgeModel, Ages, check_reads
from .compounding import Compounding, ScheduleCheck
from .costs import Broadcast, Costs, LayerTiming, Link, StageCost
from .curves import Guidance, Redundancy
from .data import Data, Document
from .dryrun import dry_run
from .errors import HybridiffError, InputError, PlanMismatchError, TargetError, UsageError, WorkerError
from .files import is_special, parse_json, write_atomically, write_text_atomically
from .layers import Layer, LayerGraph, Value
from .partition import WHOLE, Partition
from .pattern import BRANCHES, Branch, Combine, Pattern, Read, Unit
from .plan import Certificate, Plan, PlanProvenance, Predictions, RankSpec
from .profile import Profile
from .provenance import ModelInfo, Provenance
from .schedule import (
    AdaptiveSchedule,
    FixedSchedule,
    Schedule,
    Statistic,
    SwitchedSchedule,
    format_steps,
    parse_steps,
)
from .segment import Segment, lower
from .signature import CallSignature, LeafSpec
from .step_errors import ErrorCurve, ErrorSampling, PatternErrors, at_gap

__all__ = [
    "BRANCHES", "NEVER", "WHOLE", "AdaptiveSchedule", "AgeModel", "Ages", "Branch", "Broadcast", "CallSignature",
    "Certificate", "Combine", "Compounding", "Costs", "Data", "Document", "ErrorCurve", "ErrorSampling",
    "FixedSchedule", "Guidance", "HybridiffError", "InputError", "Layer", "LayerGraph", "LayerTiming", "LeafSpec",
    "Link", "ModelInfo", "Partition", "Pattern", "PatternErrors", "Plan", "PlanMismatchError", "PlanProvenance",
    "Predictions", "Profile", "Provenance", "RankSpec", "Read", "Redundancy", "Schedule", "ScheduleCheck", "Segment",
    "StageCost", "Statistic", "SwitchedSchedule", "TargetError", "Unit", "UsageError", "Value", "WorkerError",
    "at_gap", "check_reads", "dry_run", "format_steps", "is_special", "lower", "parse_json", "parse_steps",
    "write_atomically", "write_text_atomically",
]
