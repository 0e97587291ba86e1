"""Rows of demo and bench as tables."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from .results import BenchModel, BenchResults, ModelResults, Row
from .strip import letters
from .style import plain_table

__all__ = ["bench_tables", "results_table"]


def results_table(
    title: str, results: ModelResults, *, alphabet: Mapping[str, str] | None = None
) -> Table:
    """One line per row; `alphabet` gives the letter of each pattern name (default: `letters`)."""
    alphabet = alphabet or letters(name for row in results.rows for name in row.patterns)
    table = plain_table(title, "row", fold=False)
    table.add_column("steps", justify="right")
    table.add_column("per pattern", overflow="fold")
    for heading in ("latency s", "speed-up", "ideal", "work", "predicted", "PSNR dB", "worst", "predicted", "max diff"):
        table.add_column(heading, justify="right", overflow="fold")
    for row in results.rows:
        table.add_row(row.name, str(row.steps), _patterns(row, alphabet), *_numbers(row))
    return table


def _patterns(row: Row, alphabet: Mapping[str, str]) -> str:
    return " ".join(f"{alphabet[name]} {count}" for name, count in row.patterns.items())


def _numbers(row: Row) -> list[str]:
    return [
        _number(row.latency_s, "{:.3f}"), _number(row.speedup, "{:.2f}x"), _number(row.ideal_speedup, "{:.2f}x"),
        _number(row.work_speedup, "{:.2f}x"),
        _number(row.predicted_speedup, "{:.2f}x"), _number(row.psnr_db, "{:.1f}"), _number(row.psnr_db_min, "{:.1f}"),
        _number(row.predicted_psnr_db, "{:.1f}"), _number(row.max_abs_diff, "{:.1e}"),
    ]


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return "0" if value == 0 else form.format(value)


def bench_tables(results: BenchResults) -> list[Table]:
    """One table per model of a run of `hybridiff bench`."""
    return [_table(name, model, results) for name, model in results.models.items()]


def _table(name: str, model: BenchModel, results: BenchResults) -> Table:
    weights = ", random weights: latency only" if results.random_weights else ""
    table = plain_table(
        f"{name} on {results.device}{weights}", "row", "pixels", "steps", "loop s", "predicted", "vs strong",
        "vs eager", "overhead", "end to end s", "KiB/step", "peak GiB", "predicted",
    )
    for row in model.rows:
        table.add_row(
            row.name, str(row.pixels), str(row.steps), f"{row.loop_s:.3f}", _form(row.predicted_s, "{:.3f}"),
            _form(row.speedup_vs_strong, "{:.2f}x"),
            _form(row.speedup_vs_eager, "{:.2f}x"), _form(row.overhead_fraction, "{:.1%}"),
            _form(row.end_to_end_s, "{:.3f}"),
            _form(None if row.bytes_per_step is None else row.bytes_per_step / 1024, "{:.0f}"),
            _form(row.peak_gib, "{:.1f}"), _form(row.predicted_peak_gib, "{:.1f}"),
        )
    return table


def _form(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
