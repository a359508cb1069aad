"""Rows of JSON text: one value a line, or one list of them, read as a stream.

A number remembers how it was written, a key that stands twice in an object makes the row malformed, and no line or
element takes more memory than `MAX_ROW_BYTES` without a message.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, Literal

OnBadLine = Literal["stop", "count"]

BOM = b"\xef\xbb\xbf"
#: A line, or an element of a list, that is longer is no row.
MAX_ROW_BYTES = 128 << 20
_TEXT_OF_BROKEN = 300
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 4 << 20
#: An error nearer to the end of what was read so far may come of the cut: \uXXXX, -Infinity, the start of a number.
_NEAR_END = 32
_BLANK = re.compile(r"[ \t\r\n]*")


class WrittenFloat(float):
    """A number of a JSON file that knows how it was written: 0.50 and 1e5 are 0.5 and 100000.0 to Python."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        made = super().__new__(cls, text)
        made.text = text
        return made


@dataclass(frozen=True)
class BrokenRow:
    """In place of a row that could not be read: a malformed row with this reason."""

    reason: str
    text: str


class _DuplicateKey(Exception):
    pass


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(next(name for name in names if names.count(name) > 1))
    return made


_DECODER = json.JSONDecoder(parse_float=WrittenFloat, object_pairs_hook=_distinct)
_LENIENT = json.JSONDecoder(parse_float=WrittenFloat)


def _twice(error: _DuplicateKey, text: str) -> BrokenRow:
    return BrokenRow(f"an object names the key {str(error)[:40]!r} twice, so one value would be lost", _start_of(text))


def _start_of(text: str) -> str:
    return text[:_TEXT_OF_BROKEN]


def read_json(name: str, stream: BufferedReader[Any], is_lines: bool, on_bad_line: OnBadLine = "stop") -> Iterator[Any]:
    """Rows of a file by its content: a list of rows, or one a line.

    Args:
        name: of the file, for messages.
        stream: at its start.
        is_lines: what the name says; it counts where the content may be either.
        on_bad_line: stop, or yield a `BrokenRow`.

    Raises:
        ValueError: not JSON, not UTF-8, one object that holds something else than a row, or a line that is too long.
    """
    if has_lines(stream, is_lines):
        yield from read_json_lines(name, stream, on_bad_line)
    elif is_list(stream):
        yield from read_json_list(name, stream)
    else:
        yield from _read_document(name, stream)


def has_lines(stream: BufferedReader[Any], is_lines: bool) -> bool:
    """Whether a file has a value a line; `is_lines` as for `read_json`. Nothing is taken from the stream."""
    start = _start(stream)
    line, has_end, rest = start.partition(b"\n")
    is_first_whole = bool(has_end) and _is_json(line) and bool(rest.strip())
    if start.startswith(b"["):
        # In a file of lines a row may be a list, which is malformed.
        return is_lines and is_first_whole
    return is_lines or not start.startswith(b"{") or is_first_whole or _only_cr(start)


def _start(stream: BufferedReader[Any]) -> bytes:
    return stream.peek(1).removeprefix(BOM).lstrip()


def _only_cr(start: bytes) -> bool:
    return b"\r" in start and b"\n" not in start


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def is_list(stream: BufferedReader[Any]) -> bool:
    """Whether the text is one list."""
    return _start(stream).startswith(b"[")


def is_rows(stream: BufferedReader[Any]) -> bool:
    """Whether the text is a list, or has an object on its first line."""
    if is_list(stream):
        return True
    while (line := stream.readline(MAX_ROW_BYTES)) and not line.strip():
        pass
    line = line.removeprefix(BOM).lstrip()
    return line.startswith(b"{") and _is_json(line)


def read_json_lines(
    name: str, stream: BufferedReader[Any], on_bad_line: OnBadLine = "stop", num_before: int = 0
) -> Iterator[Any]:
    """One JSON value a line; blank lines are none. `num_before`: lines before these. Errors as `read_json`."""
    number, decode = num_before, _DECODER.decode
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(BOM)
        if len(line) > MAX_ROW_BYTES:
            _skip_line(stream)
            reason = f"line is longer than {MAX_ROW_BYTES >> 20} MiB"
            if on_bad_line == "stop":
                raise ValueError(f"{name}, line {number}: {reason}, so this is no table of rows")
            yield BrokenRow(reason, "")
            continue
        if line.isspace():
            continue
        line = line.rstrip(b"\r\n")
        try:
            yield decode(line.decode())
        except _DuplicateKey as error:
            yield _twice(error, line.decode())
        except (ValueError, RecursionError) as error:
            yield from _of_bad_line(line, f"{name}, line {number}", error, on_bad_line)


@dataclass(frozen=True)
class Lines:
    """A block of whole lines of JSON. `number`: lines before it."""

    name: str
    data: bytes
    number: int
    on_bad_line: OnBadLine

    def rows(self) -> Iterator[Any]:
        """Its rows, one by one. Errors as `read_json_lines`."""
        stream: BufferedReader[Any] = BufferedReader(io.BytesIO(self.data))
        return read_json_lines(self.name, stream, self.on_bad_line, num_before=self.number)


def read_lines(name: str, stream: BufferedReader[Any], on_bad_line: OnBadLine) -> Iterator[Lines]:
    """Blocks of a file that has one JSON value a line."""
    number, is_first = 0, True
    while data := stream.read(_BLOCK_BYTES):
        if not data.endswith(b"\n"):
            data += stream.readline(MAX_ROW_BYTES + 1)
        while not data.endswith(b"\n") and len(data) > MAX_ROW_BYTES and (more := stream.readline(_BLOCK_BYTES)):
            # Longer than a row may be: what is behind its limit is not kept, the reader of lines says so.
            data = data if not more.endswith(b"\n") else data + b"\n"
        block = Lines(name, data.removeprefix(BOM) if is_first else data, number, on_bad_line)
        number, is_first = number + data.count(b"\n"), False
        yield block


def _skip_line(stream: BufferedReader[Any]) -> None:
    while (part := stream.readline(_CHUNK_BYTES)) and not part.endswith(b"\n"):
        pass


def _of_bad_line(line: bytes, where: str, error: Exception, on_bad_line: OnBadLine) -> Iterator[Any]:
    """What a line holds that is no JSON value: several, where lines end with CR alone; else nothing."""
    parts = [part for part in line.split(b"\r") if part.strip()]
    if len(parts) > 1 and all(map(_is_json, parts)):
        for part in parts:
            try:
                yield _DECODER.decode(part.decode())
            except _DuplicateKey as twice:
                yield _twice(twice, part.decode())
        return
    if on_bad_line == "stop":
        raise _said(error, where, line, "; on_bad_line: count makes malformed rows of such lines") from error
    yield BrokenRow(_reason(error, line), _start_of(line[: 4 * _TEXT_OF_BROKEN].decode("utf-8", "replace")))


def _reason(error: Exception, line: bytes) -> str:
    """Why a line holds no row, the same for all with that fault."""
    if b"\0" in line:
        return "line holds NUL bytes, as a crash leaves them"
    if isinstance(error, UnicodeDecodeError):
        return "line is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return "line is not JSON, or torn"
    return "line is JSON that cannot be read"


def _said(error: Exception, where: str, data: bytes = b"", count: str = "") -> ValueError:
    if b"\0" in data:
        return ValueError(f"{where}: not JSON (NUL bytes, as a crash leaves them){count}")
    if isinstance(error, UnicodeDecodeError):
        return ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert the file{count}")
    if isinstance(error, json.JSONDecodeError):
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return ValueError(f"{where}, {place}: not JSON ({error.msg}){count}")
    # a number of thousands of digits, brackets nested too deep
    return ValueError(f"{where}: JSON that cannot be read ({type(error).__name__}: {str(error)[:120]})")


class _Text:
    """JSON text, decoded as far as it is needed. Attributes: `at`, the place in `text`, and `is_whole`."""

    def __init__(self, name: str, stream: BufferedReader[Any]) -> None:
        self.name, self._stream = name, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.is_whole = "", 0, False
        self._num_lines, self._line_start, self._num_bytes = 1, 0, 0  # before `text`; _line_start is relative to it

    def more(self) -> None:
        """Read on, as much again as there is; what is behind is forgotten."""
        behind = self.text[: self.at]
        if lines := behind.count("\n"):
            self._num_lines += lines
            self._line_start = behind.rindex("\n") + 1
        self._line_start -= self.at
        self.text, self.at = self.text[self.at :], 0
        if len(self.text) > MAX_ROW_BYTES:
            raise ValueError(f"{self.where(0)}: a value is longer than {MAX_ROW_BYTES >> 20} MiB, so it is no row")
        data = self._stream.read(max(_CHUNK_BYTES, len(self.text)))
        self.is_whole = not data
        try:
            self.text += self._decoder.decode(data, final=self.is_whole)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.name}: not UTF-8 ({error.reason} at byte {self._num_bytes + error.start}); convert the file"
            ) from error
        self._num_bytes += len(data)

    def where(self, at: int) -> str:
        """A place as file, line and column."""
        before = self.text[:at]
        lines = before.count("\n")
        start = before.rindex("\n") + 1 if lines else self._line_start
        return f"{self.name}, line {self._num_lines + lines}, column {at - start + 1}"

    def next(self) -> str:
        """The next character that is no blank, not taken; "" at the end."""
        while True:
            match = _BLANK.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if self.is_whole:
                return ""
            self.more()

    def value(self) -> Any:
        """Take the value that begins here."""
        while True:
            try:
                made, end = _DECODER.raw_decode(self.text, self.at)
            except _DuplicateKey as error:
                # The rest of the value is needed to find its end.
                try:
                    _, end = _LENIENT.raw_decode(self.text, self.at)
                except json.JSONDecodeError:
                    if self.is_whole:
                        raise self.fault("cut off", len(self.text)) from None
                    self.more()
                    continue
                made = _twice(error, self.text[self.at : end])
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - _NEAR_END
                if self.is_whole or not is_cut:
                    raise self.fault(error.msg, error.pos) from error
                self.more()
                continue
            except (ValueError, RecursionError) as error:
                raise _said(error, self.where(self.at)) from error
            if end < len(self.text) or self.is_whole:  # a number may go on
                self.at = end
                return made
            self.more()

    def fault(self, said: str, at: int) -> ValueError:
        """The error of a place."""
        return ValueError(f"{self.where(at)}: not JSON ({said})")


def read_json_list(name: str, stream: BufferedReader[Any]) -> Iterator[Any]:
    """The elements of one list. Errors as `read_json`."""
    text = _Text(name, stream)
    if text.next() != "[":
        raise text.fault("Expecting a list", text.at)
    text.at += 1
    if text.next() == "]":
        text.at += 1
    else:
        while True:
            if not text.next():
                raise text.fault("the list is cut off", text.at)
            yield text.value()
            separator = text.next()
            if separator not in (",", "]"):
                raise text.fault("Expecting ',' delimiter" if separator else "the list is cut off", text.at)
            text.at += 1
            if separator == "]":
                break
    if text.next():
        raise text.fault("Extra data behind the list", text.at)


def _read_document(name: str, stream: BufferedReader[Any]) -> Iterator[Any]:
    """Objects one after the other, over several lines each. One alone is a row where it holds a plain value."""
    text = _Text(name, stream)
    text.next()
    first = text.value()
    if not text.next() and isinstance(first, dict) and all(isinstance(one, (dict, list)) for one in first.values()):
        raise ValueError(
            f"{name}: a .json file holds a list of objects, or one a line, this one holds a dict with the keys "
            f"{sorted(first)[:8]}; write the rows as a list, or one object a line in a .jsonl file"
        )
    yield first
    while text.next():
        yield text.value()
