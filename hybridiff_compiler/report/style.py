"""One look for all tables."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

__all__ = ["FittedText", "plain_table"]


class FittedText:
    """Text that is drawn for the width at hand, because folding it would take apart what stands in one column.

    Args:
        draw: function from the number of columns to the text.
    """

    def __init__(self, draw: Callable[[int], str]) -> None:
        self._draw = draw

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self._draw(options.max_width))


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
