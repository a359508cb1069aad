"""Rows of a source -> normalised rows, with a count of everything that is not in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from smoltulu.schemas.data import DataSource, SourceReport
from smoltulu.tasks.data.files import BrokenRow
from smoltulu.tasks.data.formats.columns import Row, counted_name
from smoltulu.tasks.data.formats.forms import FORMS
from smoltulu.tasks.data.formats.kto import Partners
from smoltulu.tasks.data.formats.values import DroppedRow, EmptyAnswer, MalformedRow, Tie

_NUM_EXAMPLES = 5
_EXAMPLE_CHARACTERS = 200
#: Names of columns that are counted each by itself: data whose keys are all different must not fill the memory.
_MAX_NAMES = 200
OTHER_NAMES = "other columns"


def adapt(row: Any, source: DataSource) -> dict[str, Any]:
    """One row in the normalised form of its kind (schemas.data.DatasetOutputs), without an id.

    Raises:
        MalformedRow: it cannot be trusted.
        DroppedRow: a setting of the source leaves it out.
    """
    return _adapted(row, source)[0]


def _adapted(row: Any, source: DataSource) -> tuple[dict[str, Any], Row]:
    if isinstance(row, BrokenRow):
        raise MalformedRow(row.reason)
    if not isinstance(row, dict):
        raise MalformedRow("row is not an object")
    read = Row(row, source)
    try:
        return FORMS[source.format].read(read), read
    except Tie as error:
        if source.ties == "drop":
            raise DroppedRow(str(error)) from None
        raise
    except EmptyAnswer as error:
        if source.empty_answers == "drop":
            raise DroppedRow(str(error)) from None
        raise


class SourceCounts:
    """What becomes of the rows of a source. Attribute: num_rows."""

    def __init__(self, source: DataSource) -> None:
        self.source = source
        self.num_rows = 0
        self._num_merged = 0
        self._reasons: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._noticed: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter(dict.fromkeys(source.ignore, 0))
        self._texts: Counter[str] = Counter()
        self._examples: list[str] = []

    def normalised(self, rows: Iterable[Any], first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """The place and the normalised form of each row that is neither malformed nor dropped, in order.

        A pair of KTO rows has the place of the one that completes it; its rows come all at once. `first`: the place of
        the first of `rows`.
        """
        if self.source.format == "kto":
            yield from self._pairs(rows)
        else:
            yield from self._single(rows, first)

    def count_plain(self, number: int, unread: Mapping[str, int]) -> None:
        """Count rows that are normalised as they are, and the columns of theirs that no field reads."""
        self.num_rows += number
        for name, rows in unread.items():
            self._unread[self._counted(name, self._unread)] += rows

    def _single(self, rows: Iterable[Any], first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        for place, row in enumerate(rows, first):
            self.num_rows += 1
            try:
                made, read = _adapted(row, self.source)
            except MalformedRow as error:
                self._count_malformed(place, error, row)
                continue
            except DroppedRow as error:
                self._dropped[str(error)] += 1
                continue
            if read.unread or read.noticed or read.ignored:
                self._count(read)
            for name, number in read.texts.items():
                self._texts[self._counted(name, self._texts)] += number
            yield place, made

    def _pairs(self, rows: Iterable[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        with Partners() as partners:
            for place, half in self._single(rows):
                pair = partners.meet(place, half)
                if pair is None:
                    continue
                if pair["chosen"] == pair["rejected"]:
                    reasons = self._dropped if self.source.ties == "drop" else self._reasons
                    reasons["chosen equals rejected"] += 2
                    continue
                self._num_merged += 1
                yield place, pair
            self._dropped.update(partners.without_partner())

    def _count_malformed(self, place: int, error: MalformedRow, row: Any) -> None:
        self._reasons[str(error)] += 1
        if len(self._examples) < _NUM_EXAMPLES:
            self._examples.append(f"row {place}: {error}: {shortened(row)}")

    def _count(self, read: Row) -> None:
        self._noticed.update(read.noticed)
        self._ignored.update(read.ignored)
        for name in read.unread:
            self._unread[self._counted(counted_name(name), self._unread)] += 1

    @staticmethod
    def _counted(name: str, counts: Counter[str]) -> str:
        return name if name in counts or len(counts) < _MAX_NAMES else OTHER_NAMES

    def report(self) -> SourceReport:
        """The counts so far."""
        return SourceReport(
            label=self.source.label,
            num_rows=self.num_rows,
            num_malformed=self._reasons.total(),
            reasons=dict(self._reasons.most_common()),
            examples=tuple(self._examples),
            dropped=dict(self._dropped.most_common()),
            num_merged=self._num_merged,
            noticed=dict(self._noticed.most_common()),
            unread=dict(sorted(self._unread.items())),
            texts=dict(self._texts),
            ignored=dict(self._ignored),
        )


def shortened(row: Any) -> str:
    """A row for a message."""
    if isinstance(row, BrokenRow):
        return ascii(row.text[:_EXAMPLE_CHARACTERS])
    # ascii, so that a lone surrogate can be shown; default=str, because parquet cells may be dates.
    try:
        text = json.dumps(row, ensure_ascii=True, default=str)
    except (ValueError, RecursionError):
        text = "a row nested too deep to be shown"
    return text if len(text) <= _EXAMPLE_CHARACTERS else text[: _EXAMPLE_CHARACTERS - 1] + "…"
