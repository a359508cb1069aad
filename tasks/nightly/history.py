"""The nights of a recipe: one Parquet file each, in `<store root>/history/<recipe>/`. A file appears whole, or not.

<date>-<run>.parquet  what one night found; sorted by the time in it
pins.json             baselines, `tasks/nightly/pins.py`
told.json             what the next night may compare with, for gc
lock                  held by the night that goes on
damaged-…             a file that could not be read
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from smoltulu.artifacts.files import READ_ERRORS, make_folder, read_plain, sync, write_atomically, write_synced
from smoltulu.artifacts.layout import ASIDE_PREFIX, LOCK, TOLD, history_path
from smoltulu.artifacts.locks import holder_text, open_lock, take, write_holder
from smoltulu.schemas.common import printable
from smoltulu.schemas.nightly import MeasuredModel, Told

if TYPE_CHECKING:
    import pyarrow as pa

#: Raise it where a column changes its meaning; a file of another format is named and left where it is.
FORMAT = 1

Kind = Literal["night", "score", "comparison", "failed", "repeated"]
#: Begins the reason of a comparison whose reference could not be read: that may have an end, so it is tried again.
UNREAD = "what it is compared with cannot be read"


@dataclass(frozen=True)
class Row:
    """One line of a night. What a kind has not is None or empty.

    night       the night as a whole: `verdict` (well or failed), `reason` (its message), `num_items` (nights missed)
    score       a model that is told of: its score of a task
    comparison  a score beside that of a reference (`against`: baseline or last), and the verdict
    failed      a model whose evaluation failed, and the `reason`
    repeated    a task measured again with the same weights: `verdict` (identical, harness changed, unknown)

    key, evaluation, model       of the evaluation: its key, the digest of its contents, and that of the model
    reference, reference_model   key and model of the evaluation that it is compared with
    """

    kind: Kind
    at: str
    run: str
    node: str = ""
    model: str = ""
    stage: str = ""
    key: str = ""
    generation: str = ""
    evaluation: str = ""
    task: str = ""
    metric: str = ""
    value: float | None = None
    stderr: float | None = None
    against: str = ""
    reference: str = ""
    reference_model: str = ""
    reference_value: float | None = None
    p_value: float | None = None
    adjusted: float | None = None
    num_items: int | None = None
    num_lost: int | None = None
    num_gained: int | None = None
    verdict: str = ""
    reason: str = ""

    def measured(self) -> MeasuredModel:
        """The evaluation that a score is of. ValueError where the line does not say it."""
        return MeasuredModel(
            stage=self.stage,
            key=self.key,
            generation=self.generation,
            digest=self.evaluation,
            model_digest=self.model,
        )


_COLUMNS = {field.name: str(field.type) for field in fields(Row)}


class History:
    """The nights of one recipe. OSError where the store cannot be written."""

    def __init__(self, root: Path, recipe: str) -> None:
        self.root = Path(root)
        self.folder = history_path(self.root, recipe)
        #: What was passed over, in words.
        self.notes: list[str] = []

    @contextlib.contextmanager
    def alone(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the lock of the recipe's nights: a second one waits, and then finds what the first told."""
        make_folder(self.folder, self.root)
        with open_lock(self.folder / LOCK) as lock:
            take(lock.fileno(), lambda: waiting(holder_text(self.folder)))
            write_holder(lock)
            for draft in self.folder.glob(".*.parquet.*"):  # of a night that was killed: nobody else writes now
                draft.unlink(missing_ok=True)
            yield

    def read(self, set_aside: bool = True) -> list[Row]:
        """Every line of every night, oldest night first. A file that cannot be read is named, set aside and skipped.

        set_aside  False: it is left where it is, for who only looks
        """
        nights = []
        for file in sorted(self.folder.glob("*.parquet")) if self.folder.is_dir() else []:
            if file.name.startswith((".", ASIDE_PREFIX)):
                continue
            try:
                nights.append(_read(file))
            except OSError as error:
                if error.errno is None or error.errno in READ_ERRORS:  # says nothing of what lies there
                    self.notes.append(f"history {printable(file.name)}: passed over, {error.strerror or error}")
                else:
                    self._damaged(file, f"it {error.strerror}", set_aside)
            except _OtherFormat as error:
                self.notes.append(f"history {printable(file.name)}: passed over, {error}")
            except ValueError as error:
                self._damaged(file, str(error), set_aside)
        nights.sort(key=lambda rows: rows[0].at if rows else "")
        return [row for rows in nights for row in rows]

    def add(self, rows: Sequence[Row], told: Iterable[MeasuredModel]) -> Path:
        """Add a night, on disk when this returns. `told`: what the next night may compare with.

        gc learns it first: what it must keep is named before the night that names it is there.
        """
        assert rows and rows[0].kind == "night"
        make_folder(self.folder, self.root)
        write_atomically(self.folder / TOLD, Told(evaluations=tuple(dict.fromkeys(told))).model_dump_json(indent=1))
        name = f"{rows[0].at[:10]}-{rows[0].run}.parquet"
        draft = self.folder / f".{name}.{os.getpid()}"  # gc knows names of this form as temporary
        write_synced(draft, _bytes(rows))
        draft.replace(self.folder / name)
        sync(self.folder)
        return self.folder / name

    def _damaged(self, file: Path, why: str, set_aside: bool) -> None:
        if not set_aside:
            self.notes.append(f"history {printable(file.name)} cannot be read: {why}")
            return
        aside = file.with_name(f"{ASIDE_PREFIX}{file.name}")
        try:
            file.rename(aside)
            self.notes.append(f"history {printable(file.name)} cannot be read: {why}; set aside as {aside.name}")
        except OSError as error:
            self.notes.append(f"history {printable(file.name)} cannot be read: {why}; left there: {error.strerror}")


class _OtherFormat(ValueError):
    """A file of a format that this version does not read."""


def _schema() -> pa.Schema:
    import pyarrow as pa

    types = {"str": pa.string(), "Kind": pa.string(), "float | None": pa.float64(), "int | None": pa.int64()}
    return pa.schema([(name, types[kind]) for name, kind in _COLUMNS.items()], metadata={"format": str(FORMAT)})


def _bytes(rows: Sequence[Row]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=_schema()), sink, compression="zstd")
    return bytes(sink.getvalue())


def _read(file: Path) -> list[Row]:
    """Lines of one night. ValueError, in a line, where it is not whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = read_plain(file)
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)  # read_table would plan a data set
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"it is no whole Parquet file ({printable(str(error)).splitlines()[0][:200]})") from None
    found = (table.schema.metadata or {}).get(b"format", b"none").decode(errors="replace")
    if found != str(FORMAT):
        raise _OtherFormat(f"it has format {printable(found)}; this version reads {FORMAT}")
    if not table.schema.equals(_schema()):
        odd = sorted(columns.keys() ^ _COLUMNS.keys())
        raise ValueError(f"it has other columns: {printable(', '.join(odd))[:200] or 'of other types'}")
    rows = [Row(*line) for line in zip(*(columns[name] for name in _COLUMNS), strict=True)]
    if not rows or rows[0].kind != "night" or any(not isinstance(row.at, str) for row in rows):
        raise ValueError("its first line is not that of a night")
    return rows


# --- What the nights say. Pure. --------------------------------------------------------------------------------------


def num_missed(rows: Sequence[Row], today: date) -> int:
    """Nights (days, UTC) between the last one and today on which none ran; 0 where there was none yet."""
    nights = [day for row in rows if row.kind == "night" and (day := _day(row.at)) is not None]
    return max(0, (today - max(nights)).days - 1) if nights else 0


def time_of_night(rows: Sequence[Row], now: datetime) -> datetime:
    """When a night is said to be, in whole seconds: now, but after every other, also where the clock was set back.

    Which model is the last one is told by this order.
    """
    now = now.replace(microsecond=0)
    newest = max((time for row in rows if row.kind == "night" and (time := _time(row.at))), default=None)
    return now if newest is None or newest < now else newest + timedelta(seconds=1)


def _time(at: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(at)
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _day(at: str) -> date | None:
    return time.date() if (time := _time(at)) else None


def told_models(rows: Sequence[Row]) -> dict[str, list[MeasuredModel]]:
    """Evaluation node -> what nights told of it, oldest first, one entry a change."""
    told: dict[str, list[MeasuredModel]] = {}
    for row in rows:
        if row.kind != "score":
            continue
        with contextlib.suppress(ValueError):
            measured, of_node = row.measured(), told.setdefault(row.node, [])
            if not of_node or of_node[-1] != measured:
                of_node.append(measured)
    return told


def last_different(told: Sequence[MeasuredModel], model_digest: str) -> MeasuredModel | None:
    """The newest that a night told of and that measured another model."""
    return next((one for one in reversed(told) if one.model_digest != model_digest), None)


def is_told(told: Sequence[MeasuredModel], made: MeasuredModel) -> bool:
    """Whether this evaluation of this model is the newest that nights told of: one that comes back is new again."""
    return bool(told) and told[-1].identity == made.identity


def is_compared(rows: Sequence[Row], node: str, made: MeasuredModel, reference: MeasuredModel) -> bool:
    """Whether a night told how it differs from a reference, or why it cannot be said."""
    wanted = (node, *made.identity, *reference.identity)
    return any(
        row.kind == "comparison" and compared_pair(row) == wanted and not row.reason.startswith(UNREAD) for row in rows
    )


def compared_pair(row: Row) -> tuple[str, str, str, str, str]:
    """What a line compares: node, key and model of the evaluation, then those of the reference."""
    return row.node, row.key, row.model, row.reference, row.reference_model


def next_repetition(rows: Sequence[Row], candidates: Sequence[tuple[str, str]], today: date) -> tuple[str, str] | None:
    """The (node, task) to be measured again: the one that was not for longest. None where one was today already."""
    turns: dict[tuple[str, str], int] = {}
    for number, row in enumerate(rows):
        if row.kind == "repeated":
            if _day(row.at) == today:
                return None
            turns[row.node, row.task] = number
    return min(candidates, key=lambda one: (turns.get(one, -1), candidates.index(one)), default=None)
