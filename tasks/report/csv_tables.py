"""Tables as CSV: a line for each cell, so that figures are numbers and words are words."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence

from smoltulu.artifacts.readable import clean
from smoltulu.tasks.tables.values import Cell, Column, Row, Table

HEADER = (
    "table", "title", "row", "column", "origin", "value", "stderr", "num_samples", "said", "comparable", "significant",
    "measured_with", "notes",
)  # fmt: skip
_NUMBER = re.compile(r"(-?[\d,]+(?:\.\d+)?)(?: ± ([\d.]+))?")


def csv_tables(tables: Sequence[Table]) -> str:
    """`value`: empty where `said` has words instead; `comparable`: of a measured cell with published ones beside it."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(HEADER)
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.published, row.published, strict=True):
                writer.writerow(map(_plain, _line(table, row, column, "published", cell)))
            for column, cell in zip(table.measured, row.measured, strict=True):
                writer.writerow(map(_plain, _line(table, row, column, "measured", cell)))
    return stream.getvalue()


def _line(table: Table, row: Row, column: Column, origin: str, cell: Cell | None) -> Iterator[str]:
    measured = origin == "measured"
    missing = "not measured" if measured else "not published"
    number = None if cell is None else _NUMBER.fullmatch(cell.value)
    yield from (table.name, table.title, f"{row.title} {row.detail}".strip(), column.title, origin)
    yield number[1].replace(",", "") if number else ""
    yield (number[2] or "") if number else ""
    yield "" if cell is None else cell.num_samples.replace(",", "")
    yield "; ".join((*(cell.marks if number else (cell.value, *cell.marks)),)) if cell else missing
    beside = measured and number is not None and any(row.published)
    yield ("no" if cell and cell.not_comparable else "yes") if beside else ""
    yield (
        " ".join((*(f"> {letter}" for letter in cell.above), *(f"< {letter}" for letter in cell.below))) if cell else ""
    )
    yield row.source if measured and cell else ""
    numbers = dict.fromkeys((*(cell.notes if cell else ()), *column.notes, *row.notes))
    yield "; ".join(table.notes[number - 1] for number in numbers)


def _plain(text: str) -> str:
    """One line. A spreadsheet reads what begins like a formula as one: names come from data and recipes."""
    line = " ".join(clean(text).split())
    return f"'{line}" if line[:1] in "=+@-" and not _NUMBER.fullmatch(line) and line else line
