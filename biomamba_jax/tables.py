"""Tables for the terminal and for the pages of `html`."""

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import rich.table
from rich.console import Console
from rich.text import Text


class Table(NamedTuple):
    """Rows of cells under column names: shown by `print_tables`, and on pages by the macro `table`."""

    columns: Sequence[str]
    """Column names."""
    rows: Sequence[Sequence[Any]]
    """Cells, see `shown`. On a page a row of one cell is a heading."""
    title: str = ""
    """Shown above the table in a terminal."""
    left: Collection[int] = (0,)
    """Indices of the columns that are aligned left; the others hold figures and are aligned right."""
    emphasized: Collection[int] = ()
    """Indices of the rows in bold."""


def shown(cell: object) -> str:
    """Return a cell as text: integers with separators, a dash for None, a figure and its interval side by side."""
    if isinstance(cell, tuple):
        return " ".join(map(shown, cell))
    return "–" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell)


def summary_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table to stdout, its first column aligned left and the others right."""
    print_tables([Table(columns, rows, title)])


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables to stdout."""
    # Where stdout is not a terminal, rich would squeeze a table into 80 columns and cut cells off.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 250, highlight=False)
    for table in tables:
        console.print(_as_rich(table))


def _as_rich(table: Table) -> rich.table.Table:
    printed = rich.table.Table(title=table.title or None, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(table.columns):
        is_text = index in table.left
        printed.add_column(column, justify="left" if is_text else "right", no_wrap=index == 0 or not is_text)
    for index, row in enumerate(table.rows):
        printed.add_row(*map(Text, map(shown, row)), style="bold" if index in table.emphasized else None)
    return printed
