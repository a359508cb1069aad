"""Reads files of rows: text stays the text that was written, whatever it looks like.

A reader that guesses types makes a date of "2024-05-01", 7 of "007" and nothing of "NaN". These never do.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

#: What a local file may be called; the folder form takes every such file in it.
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz", ".lst")
_BOM = b"\xef\xbb\xbf"


class WrittenFloat(float):
    """A number of a JSON file that knows how it was written: 0.50 and 1e5 are 0.5 and 100000.0 to Python."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        made = super().__new__(cls, text)
        made.text = text
        return made


def suffix_of(path: Path) -> str | None:
    """The suffix of a file that can be read; None for any other."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)  # no suffix ends with another


def read_file(path: Path) -> Iterator[Any]:
    """Rows of a file. ValueError where it is not whole, or not what its name says."""
    suffix = suffix_of(path)
    assert suffix is not None, path
    if suffix == ".parquet":
        yield from _read_parquet(path)
        return
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".lst": _read_list}
    reader = readers[suffix.removesuffix(".gz")]
    try:
        with gzip.open(path, "rb") if suffix.endswith(".gz") else path.open("rb") as stream:
            yield from reader(path, stream)  # type: ignore[arg-type]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_list(path: Path, stream: BinaryIO) -> Iterator[dict[str, str]]:
    """One value a line, as {"text": value}: label files such as PIQA's."""
    for line in stream:
        if value := line.decode("utf-8", "replace").strip():
            yield {"text": value}


def _read_jsonl(path: Path, stream: BinaryIO) -> Iterator[Any]:
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield _parse(line.rstrip(b"\r\n"), f"{path}, line {number}")


def _read_json(path: Path, stream: BinaryIO) -> Iterator[Any]:
    document = _parse(stream.read().removeprefix(_BOM), str(path))
    if not isinstance(document, list):
        keys = f" with the keys {sorted(document)[:8]}" if isinstance(document, dict) else ""
        raise ValueError(
            f"{path}: a .json file holds one list of objects, this one holds a {type(document).__name__}{keys}; write "
            "the rows as a list, or one object a line in a .jsonl file"
        )
    yield from document


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"), parse_float=WrittenFloat)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        hint = "; one object a line is a .jsonl file" if error.msg == "Extra data" and error.lineno > 1 else ""
        raise ValueError(f"{where}, {place}: not JSON ({error.msg}){hint}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested too deep
        raise ValueError(f"{where}: JSON that cannot be read ({type(error).__name__}: {str(error)[:120]})") from error


def _read_csv(path: Path, stream: BinaryIO, delimiter: str = ",") -> Iterator[Any]:
    csv.field_size_limit(1 << 30)  # the default refuses cells above 128 KiB, which conversations reach
    reader = csv.DictReader(
        io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True
    )
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num}: more cells than the header has columns")
            yield row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 ({error.reason} after line {reader.line_num}); convert the file"
        ) from error


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({str(error)[:200]}); fetch it again") from error


def is_json_of_rows(path: Path) -> bool:
    """Whether a file is a list of rows, or has one a line, whatever its name says."""
    with path.open("rb") as stream:
        line = next((text for text in stream if text.strip()), b"").removeprefix(_BOM).lstrip()
    if line.startswith(b"["):
        return True
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_json_of_rows(path: Path) -> Iterator[Any]:
    """Rows of such a file. Text alone is a row with a `text`, as `datasets` has it."""
    with path.open("rb") as stream:
        start = stream.read(1 << 16).removeprefix(_BOM).lstrip()
        stream.seek(0)
        for row in (_read_json if start.startswith(b"[") else _read_jsonl)(path, stream):
            yield {"text": row} if isinstance(row, str) else row


def read_separated(path: Path, delimiter: str) -> Iterator[Any]:
    """Rows of a file with a header and a delimiter."""
    with path.open("rb") as stream:
        yield from _read_csv(path, stream, delimiter)
