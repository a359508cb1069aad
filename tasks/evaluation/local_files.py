"""Rows of an evaluation's local files, as lm-eval takes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data.sources import read_rows
from smoltulu.tasks.evaluation.names import hub_subset


def read_splits(
    sources: dict[str, DataSource],
    world: str | None = None,
    digests: Mapping[str, str] = {},
    config_source: str = "",
    **_: Any,
) -> dict[str, Any]:
    """lm-eval's `custom_dataset` over local files: split -> datasets.Dataset. `digests`: of splits, as for `read_rows`.

    Reads the files each time. The json builder of `datasets` would keep an old copy of a .gz file that has changed.

    A member of a group takes the rows whose `subset` is the part of the Hub's dataset that the member's definition
    (`config_source`, lm-eval gives it) reads; all rows where they have no such column.
    """
    from datasets import Dataset

    rows = {split: file_rows(split, source, world, digests.get(split)) for split, source in sources.items()}
    subset = hub_subset(Path(config_source))
    return {
        split: Dataset.from_list(rows_of_subset(split, of_split, subset) if subset else of_split)
        for split, of_split in rows.items()
    }


def rows_of_subset(split: str, rows: list[dict[str, Any]], subset: str) -> list[dict[str, Any]]:
    """Those of one `subset` ("Number Theory" is number_theory). ValueError: there are none, but of other subsets."""

    def spelled(name: Any) -> str:
        return re.sub(r"[^a-z0-9]+", "_", str(name).lower().replace("&", "and"))

    if not any("subset" in row for row in rows):
        return rows
    found = [row for row in rows if spelled(row.get("subset")) == spelled(subset)]
    if not found:
        there = ", ".join(sorted({str(row.get("subset")) for row in rows})[:40])
        raise ValueError(f"split {split!r}: no row has the subset {subset!r}; there are: {there}. Add its rows")
    return found


def file_rows(split: str, source: DataSource, world: str | None, digest: str | None) -> list[dict[str, Any]]:
    """The rows of one split, with the names of `fields`. The last file is kept: each member of a group reads it."""
    if digest is None:
        return list(_rows(split, source, world, None))
    return list(_kept_rows(split, source.model_dump_json(), world, digest))


@lru_cache(maxsize=1)
def _kept_rows(split: str, source: str, world: str | None, digest: str) -> tuple[dict[str, Any], ...]:
    return tuple(_rows(split, DataSource.model_validate_json(source), world, digest))


def _rows(split: str, source: DataSource, world: str | None, digest: str | None) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(read_rows(source, Path(world) if world else None, digest), 1):
        if not isinstance(row, dict):
            raise ValueError(f"split {split!r} of {source.label}, row {number}: expected an object, got {row!r:.80}")
        missing = [column for column in source.fields.values() if column not in row]
        if missing:
            raise ValueError(
                f"split {split!r} of {source.label}, row {number}: no column {missing[0]!r}; has {sorted(row)}"
            )
        yield {**row, **{name: row[column] for name, column in source.fields.items()}}


def forget_files() -> None:
    """Have the next task read its files anew."""
    _kept_rows.cache_clear()
