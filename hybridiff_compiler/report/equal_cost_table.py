"""Rows of equal cost as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .style import plain_table

__all__ = ["equal_cost_table"]


def equal_cost_table(rows: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    """One line per `EqualCostRow` (as a mapping); the planned one comes first."""
    table = plain_table(
        title, "schedule", "cost", "predicted dB", "PSNR dB", "worst dB", "planned better by dB"
    )
    planned = next((row for row in rows if row["name"] == "planned"), None)
    for row in rows:
        ahead = None
        if planned is not None and row is not planned:
            for key in ("psnr_db", "predicted_db"):
                if planned[key] is not None and row[key] is not None:
                    ahead = planned[key] - row[key]
                    break
        table.add_row(
            row["name"], f"1/{row['work_speedup']:.2f}", _number(row["predicted_db"]), _number(row["psnr_db"]),
            _number(row["psnr_db_min"]), "-" if ahead is None else f"{ahead:+.1f}",
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
