"""Plain conversations by columns: rows of `messages` whose turns are role and text and nothing else, in blocks.

What `formats` makes of such a row is the row itself, so Arrow reads, checks and writes whole blocks of them; a row that
has anything else goes the long way, one by one, and so does a block that Arrow refuses. A test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data.formats.columns import CHANGES_MEANING, counted_name, meaning_of
from smoltulu.tasks.data.json_rows import Lines

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_LINE_FEED, _SPACE = 0x0A, 0x20
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Plain:
    """Rows in order: runs of plain ones as a column of turns, others as they are."""

    runs: list[pa.ListArray | list[Any]]
    unread: dict[str, int] = field(default_factory=dict)  # of the plain ones: column -> rows that have it


def fits(source: DataSource) -> bool:
    """Whether rows of a source may be plain conversations."""
    return source.format == "messages" and not source.ignore and source.fields.keys() <= {"messages"}


def plain_rows(block: Lines, source: DataSource) -> Plain | None:
    """The rows of a block. None where they are to be read one by one."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.json

    data, column = block.data, source.fields.get("messages", "messages")
    characters = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(characters == _LINE_FEED)
    firsts = characters[ends[:-1] + 1 if len(ends) and ends[-1] == len(data) - 1 else ends + 1]
    # Arrow ends the process where the first value is null.
    if data[:1] != b"{" or (firsts <= _SPACE).any():  # maybe a blank line
        return None
    try:
        if not data.isascii():
            data.decode()
        turns = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))
        table = pyarrow.json.read_json(
            pa.BufferReader(data),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=pa.schema([(column, turns)]), unexpected_field_behavior="infer"
            ),
        )
    except (pa.ArrowException, UnicodeDecodeError):
        return None
    # As many values as lines, so one on each.
    if table.num_rows != len(ends) + (not data.endswith(b"\n")):
        return None
    is_plain, unread = _plain_and_unread(table, column)
    if is_plain is None:
        return None
    chunks = table.column(column).combine_chunks()
    array = chunks.chunk(0) if isinstance(chunks, pa.ChunkedArray) else chunks
    if is_plain.all():
        return Plain([array], unread)
    if not is_plain.any():
        return None
    lines = data.split(b"\n")
    runs: list[pa.ListArray | list[Any]] = []
    bounds = [0, *(np.flatnonzero(np.diff(is_plain)) + 1).tolist(), len(is_plain)]
    for start, end in pairwise(bounds):
        if is_plain[start]:
            runs.append(array.slice(start, end - start))
        else:
            few = Lines(block.name, b"\n".join(lines[start:end]), block.number + start, block.on_bad_line)
            runs.append(list(few.rows()))
    return Plain(runs, unread)


def ahead(
    blocks: Iterable[Lines | Any], source: DataSource, num_threads: int
) -> Iterator[tuple[Lines | Any, Plain | None]]:
    """Blocks with their plain rows. With threads to spare the next one is made while one is written."""

    def made(block: Lines | Any) -> Plain | None:
        return plain_rows(block, source) if isinstance(block, Lines) else None

    if num_threads < 2:
        yield from ((block, made(block)) for block in blocks)
        return
    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[Any, Future[Plain | None]] | None = None
        for block in blocks:
            following = (block, pool.submit(made, block))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _plain_and_unread(table: pa.Table, column: str) -> tuple[np.ndarray | None, dict[str, int]]:
    """(whether each row is plain, column -> plain rows that have it); None where a column needs a closer look."""
    import numpy as np
    import pyarrow as pa

    turns = table.column(column).combine_chunks()
    turns = turns.chunk(0) if isinstance(turns, pa.ChunkedArray) else turns
    if turns.type.value_type.num_fields != 2:
        return None, {}
    has: dict[str, np.ndarray] = {}
    for name in table.column_names:
        if name == column:
            continue
        if meaning_of(name) in CHANGES_MEANING:
            return None, {}
        values = table.column(name)
        if pa.types.is_null(values.type):
            continue
        if pa.types.is_string(values.type):
            has[name] = _says_something(values.combine_chunks())
        elif pa.types.is_primitive(values.type):
            has[name] = values.is_valid().to_numpy()
        else:
            return None, {}
    text = turns.values.field("content").buffers()[2]
    if text is not None and len(text) and np.frombuffer(text, np.uint8).min() == 0:  # a NUL character
        return None, {}
    is_plain = _are_plain(turns)
    counts: dict[str, int] = {}
    for name, given in has.items():
        if number := int((given & is_plain).sum()):
            counted = counted_name(name)
            counts[counted] = counts.get(counted, 0) + number
    return is_plain, counts


def _are_plain(turns: pa.ListArray) -> np.ndarray:
    """Rows whose turns are a system turn or none, then user and assistant by turns, the assistant last; no blanks."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    offsets = turns.offsets.to_numpy().astype(np.int64)
    first, last = offsets[:-1], offsets[1:] - 1
    length = offsets[1:] - offsets[:-1]
    plain = turns.is_valid().to_numpy(zero_copy_only=False) & (length > 0)
    values = turns.values
    role, content = values.field("role"), values.field("content")
    # system 0, user 1, assistant 2, anything else 3
    code = pc.fill_null(pc.index_in(role, pa.array(_ROLES)), 3).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(length)), length)
    place = np.arange(offsets[0], offsets[-1]) - np.repeat(first, length)
    code = code[offsets[0] : offsets[-1]]
    starts_with_system = np.zeros(len(length), dtype=np.int64)
    some = length > 0
    starts_with_system[some] = code[first[some] - offsets[0]] == 0
    expected = 1 + (place - starts_with_system[row]) % 2
    expected[(place == 0) & (starts_with_system[row] == 1)] = 0
    says = _says_something(content)[offsets[0] : offsets[-1]]
    is_good = (code == expected) & says & values.is_valid().to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
    plain &= np.bincount(row, weights=~is_good, minlength=len(length)) == 0
    ends = np.zeros(len(length), dtype=bool)
    ends[some] = code[last[some] - offsets[0]] == 2
    return plain & ends


def _says_something(texts: pa.Array) -> np.ndarray:
    """Which texts are there and not blank, as Python has it."""
    import numpy as np
    import pyarrow as pa

    if isinstance(texts, pa.ChunkedArray):
        texts = texts.chunk(0) if texts.num_chunks else pa.array([], pa.string())
    assert texts.offset == 0
    _, offsets_buffer, data = texts.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32)[: len(texts) + 1]
    says = texts.is_valid().to_numpy(zero_copy_only=False) & (offsets[1:] > offsets[:-1])
    if data is None:
        return says
    begins = np.zeros(len(texts), dtype=np.uint8)
    begins[says] = np.frombuffer(data, np.uint8)[offsets[:-1][says]]
    # A blank may follow only a blank: a look at those that begin with one, or with a byte of a wide character.
    for number in np.flatnonzero(says & ((begins <= 0x20) | (begins >= 0x80))).tolist():
        says[number] = not texts[number].as_py().isspace()
    return says
