"""Planning: from a profile to the best partitions, patterns and schedule. Pure: no devices, no processes, no torch."""

from .partition import candidate_partitions, linear, nested, thin
from .patterns import FAMILIES, Family, exact_patterns, family_of, generate_patterns, on_ranks

__all__ = [
    "FAMILIES", "Family", "candidate_partitions", "exact_patterns", "family_of", "generate_patterns", "linear",
    "nested", "on_ranks", "thin",
]
