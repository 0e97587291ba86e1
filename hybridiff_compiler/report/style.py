"""One look for all tables."""

from __future__ import annotations

from rich import box
from rich.table import Table

__all__ = ["plain_table"]


def plain_table(title: str, *headings: str, left: int = 1, fold: bool = True) -> Table:
    """An empty table with `headings`; the first `left` columns hold text, the others right-aligned numbers."""
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for index, heading in enumerate(headings):
        table.add_column(
            heading, justify="left" if index < left else "right", overflow="fold" if fold else "ellipsis",
            no_wrap=not fold,
        )
    return table
