"""Tables that can be sorted by any column, and say what they are to those who do not see them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from efficient_lm.pages.page import escaped

FILTERED = 12
"""Rows from which on a table can be filtered."""
NONE = "–"


@dataclass(frozen=True)
class Cell:
    """What stands in a row and a column.

    Attributes:
        text: what is read.
        order: what it is sorted by, None where there is nothing.
        link: a relative address.
        note: small, behind the text.
        marked: whether it stands out.
    """

    text: str = NONE
    order: float | str | None = None
    link: str = ""
    note: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: its heading.
        number: whether its cells are numbers, which stand to the right.
        about: more of it, where one points at the heading.
        wraps: whether its cells are sentences, over several lines.
    """

    title: str
    number: bool = False
    about: str = ""
    wraps: bool = False


@dataclass(frozen=True)
class Table:
    """A table. The first column names its row.

    Attributes:
        name: its id on the page; rows are `NAME-0` and so on.
        caption: what it shows.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def row(self, index: int) -> str:
        """The id of a row."""
        return f"{self.name}-{index}"


def laid(table: Table) -> str:
    """The table as HTML, in a box of its own, in which it scrolls."""
    head = "".join(_heading(column) for column in table.columns)
    body = "\n".join(_row(table, index, row) for index, row in enumerate(table.rows))
    name, size = escaped(table.name), len(table.rows)
    search = ""
    if size >= FILTERED:
        search = (
            f'<p class="filter" hidden><label>Filter <input type="search" aria-controls="{name}"></label> '
            f'<output data-of="{size}">{size} rows</output></p>'
        )
    return (
        f'<div class="table">{search}<div class="box" role="region" tabindex="0" aria-labelledby="{name}-caption">'
        f'<table id="{name}" aria-labelledby="{name}-caption"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n'
        f'</tbody></table></div><p class="note" id="{name}-caption">{escaped(table.caption)}</p></div>'
    )


def as_markdown(table: Table) -> str:
    """The table for a page of a repository: what stands out is bold, and links are left out."""
    lines = [
        [column.title for column in table.columns],
        ["---:" if column.number else "---" for column in table.columns],
        *([_plain(cell) for cell in row] for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _plain(cell: Cell) -> str:
    text = re.sub(r"([\\|*_`<>])", r"\\\1", cell.text)
    return (f"**{text}**" if cell.marked else text) + (f" ({cell.note})" if cell.note else "")


def _heading(column: Column) -> str:
    kind = ' class="number"' if column.number else ""
    about = f' title="{escaped(column.about)}"' if column.about else ""
    return f'<th scope="col"{kind}{about}>{escaped(column.title)}</th>'


def _row(table: Table, index: int, row: Sequence[Cell]) -> str:
    cells = [_cell(cell, column, first=not place) for place, (cell, column) in
             enumerate(zip(row, table.columns, strict=True))]  # fmt: skip
    return f'<tr id="{escaped(table.row(index))}">{"".join(cells)}</tr>'


def _cell(cell: Cell, column: Column, first: bool) -> str:
    said = {"number": column.number, "text": column.wraps, "marked": cell.marked}
    kinds = " ".join(name for name, holds in said.items() if holds)
    text = escaped(cell.text)
    if cell.link:
        text = f'<a href="{escaped(cell.link)}">{text}</a>'
    if cell.note:
        text += f" <small>{escaped(cell.note)}</small>"
    attributes = f' class="{kinds}"' if kinds else ""
    if cell.order is not None and (not isinstance(cell.order, str) or cell.order != cell.text):
        attributes += f' data-order="{escaped(cell.order)}"'
    elif cell.order is None:
        attributes += ' data-order=""'
    return f'<th scope="row"{attributes}>{text}</th>' if first else f"<td{attributes}>{text}</td>"
