"""Rows files, as the stage `dataset` writes them, for tests of the stages that read them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from smoltulu.schemas.data import DatasetKind
from smoltulu.tasks.data import rows as rows_file
from smoltulu.tasks.data import rows_writer


def write_rows(
    file: Path, rows: Iterable[dict[str, Any]], kind: DatasetKind | None = None, group_rows: int = rows_file.GROUP_ROWS
) -> Path:
    """Write `rows` to `file`; a text column that they lack is made up. `kind`: of the first row, where not given."""
    rows = list(rows)
    if kind is None:
        first = rows[0] if rows else {"messages": []}
        kind = "sft" if "messages" in first else "preference" if "chosen" in first else "rlvr"
    with mock.patch.object(rows_writer, "GROUP_ROWS", group_rows), rows_writer.RowsWriter(file, kind) as writer:
        for number, row in enumerate(rows):
            made_up = {"id": f"0:{number}", "verifier": "gsm8k", "ground_truth": "3"}
            writer.write({name: value for name, value in made_up.items() if name in rows_file.COLUMNS[kind]} | row)
    return file


def read_rows(file: Path) -> list[dict[str, Any]]:
    """All rows of a rows file."""
    return list(rows_file.stored_rows(file))
