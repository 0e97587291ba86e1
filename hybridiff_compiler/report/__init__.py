"""Results, profiles and plans for people to read: tables, text plots, timelines, pictures."""

from .describe import describe_plan, describe_profile, plan_summary
from .describe_planning import describe_explanation, describe_fleet, describe_frontier
from .image_grid import image_grid, to_image
from .profile_diff import describe_diff, diff_profiles
from .results import BenchResults, ModelResults, Results, Row
from .results_table import bench_tables, results_table
from .strip import count_patterns, legend, letters, representative_steps, strip
from .style import plain_table
from .textplot import text_plot
from .timeline import TIMELINE_LEGEND, timeline

__all__ = [
    "TIMELINE_LEGEND", "BenchResults", "ModelResults", "Results", "Row", "bench_tables", "count_patterns",
    "describe_diff", "describe_explanation", "describe_fleet", "describe_frontier", "describe_plan",
    "describe_profile", "diff_profiles", "image_grid", "legend", "letters", "plain_table", "plan_summary",
    "representative_steps", "results_table", "strip", "text_plot", "timeline", "to_image",
]
