"""`smoltulu audit DATA --review`: the hits one by one, the benchmark's item beside the passage of the training row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.data.rows import rows_at, texts_of
from smoltulu.tasks.report.hits import around_match, place_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

#: Without a terminal so many hits of each benchmark are printed.
_HITS_WITHOUT_TERMINAL = 20
#: A run of fewer words that both sides have is chance.
_RUN_OF_WORDS = 3
_STYLE = "bold black on yellow"
_KEYS = "n next, p previous, b next benchmark, B previous benchmark, q quit"
_NEXT, _PREVIOUS = ("n", " ", "\r", "\n", "\x1b[C", "\x1b[B"), ("p", "\x7f", "\x1b[D", "\x1b[A")
_QUIT = ("q", "Q", "\x1b", "\x03", "\x04", "")


@dataclass(frozen=True)
class Reviewed:
    """A hit: where it is. Texts are read when it is shown."""

    benchmark: str
    benchmark_row: int
    instance: int
    row: int
    row_id: str
    turn: int
    score: float
    text: str


class Hits:
    """The hits of an artifact, by benchmark, then instance, then score. Attributes: firsts, of each benchmark."""

    def __init__(self, hits: Path, queries: Path, rows: Path, without: Sequence[Hits] = ()) -> None:
        """
        hits     hits.parquet of a contamination artifact
        queries  queries.parquet of its index
        rows     the rows file that was searched
        without  hits by another mode: the same row and instance are not shown again
        """
        from pyarrow import parquet

        order = [
            ("benchmark", "ascending"),
            ("benchmark_row", "ascending"),
            ("score", "descending"),
            ("row", "ascending"),
        ]
        table = parquet.read_table(hits, columns=list(Reviewed.__dataclass_fields__))
        seen = set().union(*(one.keys() for one in without))
        if seen:
            table = table.filter([key not in seen for key in _keys(table)])
        self._table = table.sort_by(order)
        names = self._table.column("benchmark").to_pylist()
        self.firsts = [number for number, name in enumerate(names) if number == 0 or name != names[number - 1]]
        self._queries, self._rows = queries, rows

    def keys(self) -> set[tuple[str, int, int]]:
        """(benchmark, its row, training row) of each hit."""
        return set(_keys(self._table))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, number: int) -> Reviewed:
        (hit,) = self._table.slice(number, 1).to_pylist()
        return Reviewed(**hit)

    def texts(self, hit: Reviewed) -> tuple[list[str], str, tuple[str, str, str]]:
        """(query fields; where the hit is; the turn before the match, the match, the turn after it)."""
        from pyarrow import parquet

        instance = parquet.read_table(self._queries, columns=["fields"], filters=[("instance", "=", hit.instance)])
        (fields,) = instance.column("fields").to_pylist()
        row = rows_at(self._rows, [hit.row])[hit.row]
        _, turn = texts_of(row)[hit.turn]
        return fields, place_of(row, hit.turn, turn, hit.text), around_match(turn, hit.text)


def _keys(table: Any) -> list[tuple[str, int, int]]:
    columns = (table.column(name).to_pylist() for name in ("benchmark", "benchmark_row", "row"))
    return list(zip(*columns, strict=True))


def review(hits: Hits, label: str, out: Console, read_key: Callable[[], str] | None = None) -> None:
    """Show the hits: with a terminal one by one, by keys; without one the first of each benchmark, one after the other.

    read_key  returns the next key; none: from the terminal
    """
    if not len(hits):
        out.print(f"{label}: no hits to review")
        return
    if read_key is None:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            _print_all(hits, label, out)
            return
        import click

        read_key = click.getchar
    position: int | None = 0
    while position is not None:
        out.clear()
        _show(hits, position, label, out)
        out.print(_KEYS, style="dim")
        try:
            key = read_key()
        except (KeyboardInterrupt, EOFError):
            return
        position = moved(hits.firsts, len(hits), position, key)


def moved(firsts: Sequence[int], num_hits: int, position: int, key: str) -> int | None:
    """Where a key leads: the number of a hit, or None to quit. Other keys, and those that lead nowhere, stay.

    firsts  the first hit of each benchmark
    """
    if key in _QUIT:
        return None
    if key in _NEXT:
        return min(position + 1, num_hits - 1)
    if key in _PREVIOUS:
        return max(position - 1, 0)
    if key == "b":
        return next((first for first in firsts if first > position), position)
    if key == "B":
        here = max(first for first in firsts if first <= position)
        return max((first for first in firsts if first < here), default=here)
    return position


def _print_all(hits: Hits, label: str, out: Console) -> None:
    for first, end in pairwise([*hits.firsts, len(hits)]):
        for number in range(first, min(end, first + _HITS_WITHOUT_TERMINAL)):
            _show(hits, number, label, out)
        if end - first > _HITS_WITHOUT_TERMINAL:
            more = end - first - _HITS_WITHOUT_TERMINAL
            out.print(f"{hits[first].benchmark}: {more:,} more hits; a terminal shows them all")


def _show(hits: Hits, position: int, label: str, out: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    hit = hits[position]
    fields, place, (before, match, after) = hits.texts(hit)
    query = "\n\n".join(fields)
    passage = Text(before)
    passage.append(match, _STYLE)
    passage.append(after)
    if not match:  # the text of the hit is not in the row as it stands: mark what both sides have
        passage = shared_words(before, query)
    made = Table(title=f"{label}: hit {position + 1:,} of {len(hits):,}", title_justify="left", expand=True)
    made.add_column(f"{hit.benchmark} {hit.benchmark_row}", ratio=1, overflow="fold")
    score = "" if hit.score == 1 else f", score {hit.score:.3f}"
    made.add_column(f"row {hit.row_id}, {place}{score}", ratio=1, overflow="fold")
    cells: list[RenderableType] = [shared_words(query, match or before), passage]
    made.add_row(*cells)
    out.print(made)


def shared_words(text: str, other: str) -> Text:
    """`text`, with the runs of three words or more marked that `other` has too."""
    import re

    from rich.text import Text

    pieces = re.findall(r"\s*\S+|\s+$", text)
    plain = [_folded(piece) for piece in pieces]
    theirs = [_folded(word) for word in other.split()]
    blocks = SequenceMatcher(None, plain, theirs, autojunk=False).get_matching_blocks()
    is_shared = [False] * len(pieces)
    for block in blocks:
        if block.size >= min(_RUN_OF_WORDS, len(pieces)):
            is_shared[block.a : block.a + block.size] = [True] * block.size
    made = Text()
    for piece, marked in zip(pieces, is_shared, strict=True):
        made.append(piece, _STYLE if marked else "")
    return made


def _folded(word: str) -> str:
    return "".join(character for character in word.lower() if character.isalnum())


def review_result(result: Any, out: Console) -> None:
    """Review the hits of an `AuditResult`."""
    folders = {stage: Path(folder) for stage, folder in result.folders.items()}
    shown: list[Hits] = []
    for mode, outputs in result.checks.items():
        hits = Hits(
            folders[result.stage("contamination", mode)] / outputs.hits_file,
            folders[result.stage("benchmark_index", mode)] / "queries.parquet",
            folders["dataset"] / result.dataset.file,
            without=shown,
        )
        if shown and not len(hits):
            out.print(f"{result.label}: {mode} match has no other hits")
            continue
        review(hits, result.label if not result.also else f"{result.label}, {mode}", out)
        shown.append(hits)
