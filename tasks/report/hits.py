"""Pages with the hits of a contamination check: per benchmark, each found instance, its rows, their text.

Pages have no script and load nothing. A page holds `INSTANCES_PER_PAGE` instances with their first `ROWS_PER_INSTANCE`
rows; `hits.parquet` has all rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoltulu.tasks.data.formats.all_text import column_of
from smoltulu.tasks.data.rows import rows_at, texts_of
from smoltulu.tasks.report import text
from smoltulu.tasks.report.render import render

INSTANCES_PER_PAGE = 50
ROWS_PER_INSTANCE = 20
#: Rows are read for this many pages in one pass: they may be anywhere in the file.
_PAGES_PER_PASS = 20
_CHARACTERS_OF_TURN = 1200
_CHARACTERS_BEFORE_MATCH = 300
_CHARACTERS_OF_FIELD = 2000


@dataclass(frozen=True)
class FoundInstance:
    """One found benchmark instance, its first hits, and the number of all its rows."""

    row: int  # of the benchmark
    fields: tuple[str, ...]
    hits: tuple[dict[str, Any], ...]  # rows of hits.parquet
    num_rows: int


@dataclass(frozen=True)
class BenchmarkPages:
    """The pages of one benchmark, in order."""

    benchmark: str
    num_instances: int
    files: tuple[str, ...]


def write_hit_pages(hits: Path, queries: Path, rows: Path, folder: Path, prefix: str = "") -> list[BenchmarkPages]:
    """Write the pages of every benchmark with hits into `folder`.

    hits      hits.parquet of a contamination artifact
    queries   queries.parquet of its index
    rows      the rows file that was scanned
    prefix    of the names of the pages
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for position, (benchmark, found) in enumerate(_by_benchmark(hits, queries), 1):
        pages = [found[start : start + INSTANCES_PER_PAGE] for start in range(0, len(found), INSTANCES_PER_PAGE)]
        name = f"{prefix}{position:02d}-{text.artifact_key(benchmark)}"
        names = tuple(f"{name}-{number:04d}.html" for number in range(1, len(pages) + 1))
        for number, page in enumerate(pages):
            if number % _PAGES_PER_PASS == 0:
                shown = (instance for page in pages[number : number + _PAGES_PER_PASS] for instance in page)
                sources = rows_at(rows, (hit["row"] for instance in shown for hit in instance.hits))
            html = render(
                "hits.html.jinja",
                benchmark=benchmark,
                num_instances=len(found),
                files=names,
                page=number,
                first=number * INSTANCES_PER_PAGE + 1,
                instances=[
                    (instance, [(hit, *_shown(sources[hit["row"]], hit)) for hit in instance.hits]) for instance in page
                ],
            )
            (folder / names[number]).write_text(html, encoding="utf-8")
        made.append(BenchmarkPages(benchmark, len(found), names))
    return made


def _by_benchmark(hits: Path, queries: Path) -> Iterator[tuple[str, list[FoundInstance]]]:
    """(benchmark, its found instances in benchmark order). Hits of an instance are sorted by score, then row."""
    import pyarrow.compute
    import pyarrow.parquet

    columns = ["instance", "benchmark", "benchmark_row", "row", "row_id", "turn", "score", "text"]
    table = pyarrow.parquet.read_table(hits, columns=columns)
    fields = pyarrow.parquet.read_table(queries, columns=["instance", "fields"])
    for benchmark in sorted(pyarrow.compute.unique(table["benchmark"]).to_pylist()):
        own = table.filter(pyarrow.compute.equal(table["benchmark"], benchmark))
        own = own.sort_by([("instance", "ascending"), ("score", "descending"), ("row", "ascending")])
        counts = pyarrow.compute.value_counts(own["instance"])
        instances = counts.field("values").cast(fields["instance"].type)
        wanted = fields.filter(pyarrow.compute.is_in(fields["instance"], value_set=instances))
        texts = dict(zip(wanted["instance"].to_pylist(), wanted["fields"].to_pylist(), strict=True))
        found, start = [], 0
        for pair in counts.to_pylist():  # in order of appearance, so of position
            instance, count = pair["values"], pair["counts"]
            shown = own.slice(start, min(count, ROWS_PER_INSTANCE)).to_pylist()
            query = tuple(_cut(field, _CHARACTERS_OF_FIELD) for field in texts[instance])
            found.append(FoundInstance(shown[0]["benchmark_row"], query, tuple(shown), count))
            start += count
        yield benchmark, sorted(found, key=lambda instance: instance.row)


def _shown(row: Mapping[str, Any], hit: Mapping[str, Any]) -> tuple[str, tuple[str, str, str]]:
    """(where a hit is, the text around it)."""
    turn = texts_of(row)[hit["turn"]][1]
    return place_of(row, hit["turn"], turn, hit["text"]), around_match(turn, hit["text"])


def place_of(row: Mapping[str, Any], number: int, turn: str, match: str) -> str:
    """The turn of a hit, and the column where rows were read by columns."""
    start = turn.find(match.removesuffix("…")) if match else -1
    column = column_of(row, number, start)
    return f"turn {number}" if column is None else f"column {column}, turn {number}"


def around_match(turn: str, match: str) -> tuple[str, str, str]:
    """The text of `turn` before `match`, the match, the text after it. Without a match, all text is in the first."""
    match = match.removesuffix("…")
    start = turn.find(match) if match else -1
    if start < 0:
        return _cut(turn, _CHARACTERS_OF_TURN), "", ""
    first = max(0, start - _CHARACTERS_BEFORE_MATCH)
    last = max(start + len(match), first + _CHARACTERS_OF_TURN)
    before, after = turn[first:start], turn[start + len(match) : last]
    return f"{'…' if first else ''}{before}", match, f"{after}{'…' if last < len(turn) else ''}"


def _cut(value: str, length: int) -> str:
    return value if len(value) <= length else re.sub(r"\s+$", "", value[:length]) + "…"
