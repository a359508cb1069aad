"""Reads files of rows: text stays the text that was written, whatever it looks like.

A reader that guesses types makes a date of "2024-05-01", 7 of "007" and nothing of "NaN". These never do. What a file
is, its first bytes say before its name does: a download may be packed under a plain name, or be no data at all.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from smoltulu.tasks.data.compressed import Streams
from smoltulu.tasks.data.json_rows import (
    BOM,
    MAX_ROW_BYTES,
    BrokenRow,
    Lines,
    OnBadLine,
    WrittenFloat,
    has_lines,
    is_list,
    is_rows,
    read_json,
    read_json_lines,
    read_json_list,
    read_lines,
)

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["SUFFIXES", "BrokenRow", "WrittenFloat", "read_file", "suffix_of"]

_TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".lst")
_COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
#: What a local file may be called; the folder form takes every such file in it.
SUFFIXES = (
    *_TEXT_KINDS,
    *(kind + packed for kind in _TEXT_KINDS[:-1] for packed in _COMPRESSIONS),
    ".parquet",
    ".arrow",
)
#: For messages: the 27 of them in few words.
ALLOWED = f"{', '.join(_TEXT_KINDS)} ({', '.join(_COMPRESSIONS)} allowed), .parquet, .arrow"

_PACKED_AS = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\0": ".xz", b"BZh": ".bz2"}
_NAMES = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_UTF_16 = b"\xff\xfe"
#: First bytes of what is no table of rows -> what it is, and what to do.
_NO_ROWS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file that it stands for; run `git lfs pull` in its folder",
    b"<!DOCTYPE": "an HTML page, as a failed download leaves it; fetch it again",
    b"<!doctype": "an HTML page, as a failed download leaves it; fetch it again",
    b"<html": "an HTML page, as a failed download leaves it; fetch it again",
    b"<?xml": "an XML document, as a failed download leaves it; fetch it again",
    b"PK\x03\x04": "a zip archive; unpack it",
    _UTF_16: "UTF-16; convert it, e.g. `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16; convert it, e.g. `iconv -f UTF-16 -t UTF-8`",
}
_BUFFER_BYTES = 1 << 20
#: Rows become Python objects so many bytes at a time.
_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 1024


def suffix_of(path: Path) -> str | None:
    """The suffix of a file that can be read; None for any other."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)  # no suffix ends with another


def read_file(path: Path, on_bad_line: OnBadLine = "stop") -> Iterator[Any]:
    """Rows of a file, one at a time; a line that holds none is a `BrokenRow` where `on_bad_line` is count.

    Raises:
        ValueError: it is not whole, not what its name says, or a line is broken and `on_bad_line` is stop.
    """
    suffix = suffix_of(path)
    assert suffix is not None, path
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    _refuse_no_rows(head, path)
    if head.startswith(b"PAR1") or suffix == ".parquet":
        yield from _read_parquet(path)
    elif head.startswith(b"ARROW1") or suffix == ".arrow":
        yield from _read_arrow(path, is_file=head.startswith(b"ARROW1"))
    else:
        kind, packed = suffix, ""
        for compression in _COMPRESSIONS:
            if suffix.endswith(compression):
                kind, packed = suffix.removesuffix(compression), compression
        yield from _read_text(path, kind, _compression(head, packed, path), on_bad_line)


def read_blocks(path: Path, on_bad_line: OnBadLine = "stop") -> Iterator[Lines | list[Any]]:
    """The rows of a file in blocks: lines where it has one JSON value on each, else rows. Errors as `read_file`."""
    suffix = suffix_of(path)
    assert suffix is not None, path
    kind = next((kind for kind in (".jsonl", ".ndjson", ".json") if suffix.startswith(kind)), None)
    if kind is not None:
        with path.open("rb") as raw:
            head = raw.read(64)
        if not head.startswith((b"PAR1", b"ARROW1")):
            _refuse_no_rows(head, path)
            lines = _read_text(path, kind, _compression(head, suffix.removeprefix(kind), path), on_bad_line, True)
            first = next(lines, None)
            if isinstance(first, Lines):
                yield first
                yield from lines
                return
    rows = read_file(path, on_bad_line)
    while block := list(islice(rows, _MAX_BATCH_ROWS)):
        yield block


def _refuse_no_rows(head: bytes, path: Path) -> None:
    for start, what in _NO_ROWS.items():
        if head.removeprefix(BOM).lstrip().startswith(start):
            raise ValueError(f"{path}: is {what}")
    if len(head) > 8 and any(head[side::2].strip(b"\0") == b"" and head[1 - side :: 2].strip(b"\0") for side in (0, 1)):
        raise ValueError(f"{path}: is {_NO_ROWS[_UTF_16]}")


def _compression(head: bytes, named: str, path: Path) -> str:
    """How a file is packed, by its first bytes. ValueError where its name says so, and it is not."""
    found = next((packed for magic, packed in _PACKED_AS.items() if head.startswith(magic)), "")
    if named and not found:
        what = "empty" if not head else f"it begins with {head[:12]!r}"
        raise ValueError(
            f"{path}: not a whole {_NAMES[named]} file ({what}); fetch it again, or rename it if it is not packed"
        )
    return found


def _read_text(path: Path, kind: str, packed: str, on_bad_line: OnBadLine, in_blocks: bool = False) -> Iterator[Any]:
    """Rows of a text file; `in_blocks`: `Lines`, or nothing where it has other than JSON values a line."""
    readers: dict[str, Callable[[Path, io.BufferedReader[Any]], Iterator[Any]]] = {
        ".json": lambda path, stream: read_json(str(path), stream, is_lines=False, on_bad_line=on_bad_line),
        ".csv": lambda path, stream: read_csv(path, stream, ",", on_bad_line),
        ".tsv": lambda path, stream: read_csv(path, stream, "\t", on_bad_line),
        ".lst": _read_list,
    }
    lines = lambda path, stream: read_json(str(path), stream, is_lines=True, on_bad_line=on_bad_line)  # noqa: E731
    try:
        with _opened(path, packed) as stream:
            if packed:
                _refuse_packed_twice(stream.peek(64), path)
            if not in_blocks:
                yield from readers.get(kind, lines)(path, stream)
            elif has_lines(stream, is_lines=kind != ".json"):
                yield from read_lines(str(path), stream, on_bad_line)
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: not a whole {_NAMES[packed]} file ({error}); fetch it again") from error
    except OSError as error:  # bz2 and Arrow's zstd raise no errors of their own
        if packed and error.errno is None:
            raise ValueError(f"{path}: not a whole {_NAMES[packed]} file ({error}); fetch it again") from error
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


def _opened(path: Path, packed: str) -> io.BufferedReader[Any]:
    """A stream of a file's bytes, unpacked."""
    raw: Any
    if packed == ".gz":
        raw = gzip.GzipFile(path, "rb")
    elif packed == ".xz":
        raw = Streams(path, lzma.LZMADecompressor)
    elif packed == ".bz2":
        raw = Streams(path, bz2.BZ2Decompressor)
    elif packed == ".zst":
        import pyarrow as pa

        raw = pa.input_stream(str(path), compression="zstd")
    else:
        raw = io.FileIO(path)
    return io.BufferedReader(raw, _BUFFER_BYTES)


def _refuse_packed_twice(head: bytes, path: Path) -> None:
    for magic, packed in _PACKED_AS.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: is packed twice ({_NAMES[packed]} inside); unpack it once")
    if head[257:262] == b"ustar" or head.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path}: is an archive of files; unpack it")
    _refuse_no_rows(head, path)


def _read_list(path: Path, stream: BinaryIO) -> Iterator[dict[str, str]]:
    """One value a line, as {"text": value}: label files such as PIQA's."""
    while line := stream.readline(MAX_ROW_BYTES):
        if value := line.decode("utf-8", "replace").strip():
            yield {"text": value}


def read_csv(path: Path, stream: Any, delimiter: str = ",", on_bad_line: OnBadLine = "stop") -> Iterator[Any]:
    """Rows of a file with a header. Errors as `read_file`."""
    csv.field_size_limit(MAX_ROW_BYTES)  # the default refuses cells above 128 KiB, which conversations reach
    counts = on_bad_line == "count"
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape" if counts else "strict", newline="")
    lines = _CsvLines(text, path)
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        _check_header(list(reader.fieldnames or ()), path)
        if lines.fault:
            raise ValueError(f"{path}: the header: {lines.fault}")
        is_ragged = False  # rows that leave out their last cells
        while True:
            before, reason, cells = lines.number, "", ""
            try:
                row = next(reader, None)
                if row is None:
                    return
                reason = lines.fault or _fault_of_cells(row, is_ragged or lines.last.endswith(("\n", "\r")))
                is_ragged = is_ragged or None in row.values()
                cells = str(list(row.values())) if reason else ""
            except csv.Error as error:
                row, reason, cells = {}, "line is not CSV, or torn", lines.last
                if not counts:
                    raise ValueError(f"{path}, line {lines.number}: not CSV ({error}){_COUNT}") from error
            lines.fault = ""
            if not reason:
                yield row
            elif not counts:
                raise ValueError(f"{path}, line {lines.number}: {reason}{_COUNT}")
            else:
                # A quote that never ends takes the lines behind it along: each of them may have been a row.
                yield from [BrokenRow(reason, cells)] * (lines.number - before if not row else 1)
    except csv.Error as error:
        raise ValueError(f"{path}: the header is not CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 ({error.reason} after line {lines.number}); convert the file{_COUNT}"
        ) from error
    finally:
        text.detach()


_COUNT = "; on_bad_line: count makes malformed rows of such lines"


def _fault_of_cells(row: dict[Any, Any], may_be_short: bool) -> str:
    """Why the cells of a row cannot be trusted; "" where they can."""
    if None in row:
        return "more cells than the header has columns"
    if not may_be_short and None in row.values():
        return "line is torn: it ends before its last cell, and the file with it"
    return ""


class _CsvLines:
    """Lines of text for the reader of CSV.

    Attributes: number, of those that were read; last, the last one; fault, of a line since it was set to "".
    """

    def __init__(self, text: io.TextIOWrapper, path: Path) -> None:
        self._text, self._path = text, path
        self.last = self.fault = ""
        self.number = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_ROW_BYTES + 1)
        if len(line) > MAX_ROW_BYTES:
            raise ValueError(
                f"{self._path}: a line is longer than {MAX_ROW_BYTES >> 20} MiB, so this is no table of rows"
            )
        if not line:
            raise StopIteration
        self.last = line
        self.number += 1
        if "\0" in line:
            self.fault = "line holds NUL bytes, as a crash leaves them"
        elif not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError:
                self.fault = "line is not UTF-8"
        return line


def _check_header(names: list[str], path: Path) -> None:
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{path}: the header names {', '.join(map(repr, doubled))} more than once, so a row would lose a value; "
            "rename the columns"
        )


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow, path)
            meta = file.metadata
            groups = (meta.row_group(number) for number in range(meta.num_row_groups))
            bytes_per_row = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
            for batch in file.iter_batches(batch_size=_batch_rows(bytes_per_row), use_threads=False):
                yield from _rows_of(batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({str(error)[:200]}); fetch it again") from error


def _read_arrow(path: Path, is_file: bool) -> Iterator[Any]:
    """Rows of an Arrow file, or of a stream, as `datasets` writes it."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            if is_file:
                reader: Any = pa.ipc.open_file(source)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                reader = pa.ipc.open_stream(source)
                batches = iter(reader)
            _check_columns(reader.schema, path)
            for batch in batches:
                yield from _rows_of(batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole arrow file ({str(error)[:200]}); fetch it again") from error


def _check_columns(columns: Any, path: Path) -> None:
    """ValueError where a schema, or an object in a column, names one twice."""
    import pyarrow as pa

    is_schema = isinstance(columns, pa.Schema)
    if is_schema or pa.types.is_struct(columns):
        _check_header(columns.names, path)
    for inner in columns if is_schema else [columns.field(number) for number in range(columns.num_fields)]:
        _check_columns(inner.type, path)


def _batch_rows(bytes_per_row: float) -> int:
    return int(min(max(_BATCH_BYTES / max(bytes_per_row, 1), 1), _MAX_BATCH_ROWS))


def _rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    step = _batch_rows(batch.nbytes / max(batch.num_rows, 1))
    for start in range(0, batch.num_rows, step):
        yield from batch.slice(start, step).to_pylist()


def is_json_of_rows(path: Path) -> bool:
    """Whether a file is a list of rows, or has one a line, whatever its name says."""
    with _opened(path, "") as stream:
        return is_rows(stream)


def read_json_of_rows(path: Path, on_bad_line: OnBadLine = "stop") -> Iterator[Any]:
    """Rows of such a file. Text alone is a row with a `text`, as `datasets` has it."""
    with _opened(path, "") as stream:
        rows = read_json_list(str(path), stream) if is_list(stream) else read_json_lines(str(path), stream, on_bad_line)
        for row in rows:
            yield {"text": row} if isinstance(row, str) else row


def read_separated(path: Path, delimiter: str, on_bad_line: OnBadLine = "stop") -> Iterator[Any]:
    """Rows of a file with a header and a delimiter."""
    with _opened(path, "") as stream:
        yield from read_csv(path, stream, delimiter, on_bad_line)
