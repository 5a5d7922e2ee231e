"""Text and tables for a terminal. Into a file or a pipe there is no width to fit into: nothing is cut or wrapped there."""

import shutil
import sys
import textwrap
from collections.abc import Sequence


def fitted(text: str, first: str = "", others: str = "") -> str:
    """
    A line of text in lines as wide as the terminal, cut between words: the first one begins with `first`, the others with
    `others`.
    """
    if not sys.stdout.isatty():
        return (first + text).rstrip()
    lines = textwrap.wrap(
        text,
        max(40, shutil.get_terminal_size().columns),
        initial_indent=first,
        subsequent_indent=others,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return "\n".join(lines) or first.rstrip()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """
    Prints a table whose first column holds names, with rich if it is installed. Where the terminal is too narrow, cells
    are wrapped, at spaces if that is enough.
    """
    try:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [header, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print(f"\n{title}")
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if note:
            print(fitted(note))
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    grid = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    names, *columns = zip(header, *rows, strict=True)
    widths = [max(len(text) for text in (*cells[0].split(), *cells[1:])) for cells in columns]
    if max(map(len, names)) + sum(widths) + 2 * len(header) > console.width:
        widths = [max(len(word) for cell in cells for word in cell.split()) for cells in columns]
    grid.add_column(names[0], overflow="fold")
    for (name, *_), width in zip(columns, widths, strict=True):
        grid.add_column(name, justify="right", width=width)
    for row in rows:
        grid.add_row(*row)
    console.print(f"\n{title}", style="bold", markup=False, highlight=False)
    console.print(grid)
    if note:
        console.print(note, style="dim", markup=False, highlight=False)
