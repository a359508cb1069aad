"""Turns of training rows in blocks of bounded size, as byte buffers: from normalised rows in JSON lines, or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smoltulu.schemas.contamination import Shard
from smoltulu.tasks.contamination.kernels.json import read_rows
from smoltulu.tasks.contamination.kernels.layout import ROLES

_BLOCK_BYTES = 8 << 20
_PARQUET_ROWS = 4_096
# Shortest possible: {"id":"","prompt":[]} and {"role":"","content":""}.
_ROW_BYTES, _TURN_BYTES = 21, 24
_PARTS = ("messages", "prompt", "chosen", "rejected")


class TurnBlock(NamedTuple):
    """Turns in the order of their rows. Rows are numbered within the shard."""

    text: np.ndarray  # uint8
    turn_start: np.ndarray  # int64: turn t is text[turn_start[t]:turn_end[t]]
    turn_end: np.ndarray  # int64
    turn_row: np.ndarray  # int64
    turn_index: np.ndarray  # int64: number of the message; prompt, chosen and rejected are counted through
    first_row: int
    num_rows: int
    ids: np.ndarray  # uint8
    id_offsets: np.ndarray  # int64, by row of the block
    line_start: np.ndarray  # int64: bytes of the rows' lines in the file; -1 in Parquet
    line_end: np.ndarray  # int64


def plan_shards(path: Path, shard_bytes: int = 64 << 20) -> list[Shard]:
    """Parts of about `shard_bytes`: ranges of whole lines of a .jsonl file, or of row groups of a .parquet file.

    Raises:
        ValueError: a file of another kind, or one that cannot be read.
    """
    if path.suffix == ".parquet":
        bounds = _row_group_bounds(path, shard_bytes)
    elif path.suffix == ".jsonl":
        bounds = _line_bounds(path, shard_bytes)
    else:
        raise ValueError(f"{path}: only .jsonl and .parquet can be scanned; make a data set of it first")
    pairs = list(pairwise(bounds)) or [(0, 0)]
    return [
        Shard(path=str(path), number=number, num_shards=len(pairs), start=start, end=end)
        for number, (start, end) in enumerate(pairs)
    ]


def _line_bounds(path: Path, shard_bytes: int) -> list[int]:
    size = path.stat().st_size
    bounds = [0]
    with path.open("rb") as stream:
        while bounds[-1] + shard_bytes < size:
            stream.seek(bounds[-1] + shard_bytes - 1)
            at = stream.tell()
            while (chunk := stream.read(1 << 16)) and b"\n" not in chunk:
                at += len(chunk)
            at = at + chunk.index(b"\n") + 1 if chunk else size
            if at >= size:
                break
            bounds.append(at)
    return [*bounds, size] if size else []


def _row_group_bounds(path: Path, shard_bytes: int) -> list[int]:
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({str(error)[:200]}); fetch it again") from error
    bounds, gathered = [0], 0
    for group in range(metadata.num_row_groups):
        gathered += metadata.row_group(group).total_byte_size
        if gathered >= shard_bytes or group == metadata.num_row_groups - 1:
            bounds.append(group + 1)
            gathered = 0
    return bounds


def read_blocks(shard: Shard, roles: Sequence[str]) -> Iterator[tuple[TurnBlock, int]]:
    """Blocks of the shard, each with the bytes (.jsonl) or row groups (.parquet) of the shard that are read by then.

    Raises:
        ValueError: a row that is not in normalised form, with its place.
    """
    if Path(shard.path).suffix == ".parquet":
        yield from _parquet_blocks(shard, roles)
    else:
        yield from _line_blocks(shard, roles)


def _line_blocks(shard: Shard, roles: Sequence[str]) -> Iterator[tuple[TurnBlock, int]]:
    wanted = sum(1 << ROLES.index(role) for role in roles)
    left, offset, first_row, kept = shard.end - shard.start, shard.start, 0, 0
    room = _BLOCK_BYTES
    words = np.empty(room // 8, np.uint64)
    with open(shard.path, "rb") as stream:
        stream.seek(shard.start)
        while left or kept:
            data = words.view(np.uint8)
            count = _fill(stream, data[kept : min(room, kept + left)])
            if count == 0 and left:
                raise ValueError(f"{shard.path}: ended at byte {shard.end - left}; it became shorter during the scan")
            left -= count
            filled = kept + count
            end = filled if not left else _behind_last_line_feed(data[:filled])
            if end == 0:  # one row fills all of it
                room *= 2
                wider = np.empty(room // 8, np.uint64)
                wider.view(np.uint8)[:filled] = data[:filled]
                words, kept = wider, filled
                continue
            block = _parse(data[:end], words, wanted, shard.path, offset, first_row, roles)
            yield block, offset + end - shard.start
            first_row += block.num_rows
            offset += end
            kept = filled - end
            if room > _BLOCK_BYTES and kept <= _BLOCK_BYTES:
                room = _BLOCK_BYTES
                narrower = np.empty(room // 8, np.uint64)
                narrower.view(np.uint8)[:kept] = data[end:filled]
                words = narrower
            else:
                data[:kept] = data[end:filled].copy()


def _fill(stream: BinaryIO, target: np.ndarray) -> int:
    return stream.readinto(target.data) if len(target) else 0  # type: ignore[attr-defined]


def _behind_last_line_feed(data: np.ndarray) -> int:
    for stop in range(len(data), 0, -(1 << 16)):
        start = max(0, stop - (1 << 16))
        found = data[start:stop].tobytes().rfind(b"\n")
        if found >= 0:
            return start + found + 1
    return 0


def _parse(
    data: np.ndarray, words: np.ndarray, wanted: int, path: str, offset: int, first_row: int, roles: Sequence[str]
) -> TurnBlock:
    num_rows, num_turns = len(data) // _ROW_BYTES + 1, len(data) // _TURN_BYTES + 1
    text, ids = np.empty(len(data), np.uint8), np.empty(len(data), np.uint8)
    turn_start, turn_end, turn_row, turn_index = (np.empty(num_turns, np.int64) for _ in range(4))
    line_start, line_end = np.empty(num_rows, np.int64), np.empty(num_rows, np.int64)
    id_end = np.zeros(num_rows + 1, np.int64)
    at = np.zeros(5, np.int64)
    turns = (turn_start, turn_end, turn_row, turn_index)
    while not read_rows(data, words, wanted, at, text, *turns, line_start, line_end, ids, id_end):
        i, row, turn, n, num_id_bytes = (int(value) for value in at)
        length = data[i:].tobytes().find(b"\n") + 1 if len(data) - i < 1 << 16 else _line_length(data, i)
        line = data[i : i + length if length else len(data)].tobytes()
        row_id, messages = _row(line, f"{path}, byte {offset + i}")
        for index, role, content in messages:
            if role in roles:
                text[n : n + len(content)] = np.frombuffer(content, np.uint8)
                turn_start[turn], turn_end[turn], turn_row[turn], turn_index[turn] = n, n + len(content), row, index
                n, turn = n + len(content), turn + 1
        ids[num_id_bytes : num_id_bytes + len(row_id)] = np.frombuffer(row_id, np.uint8)
        line_start[row], line_end[row], id_end[row + 1] = i, i + len(line), num_id_bytes + len(row_id)
        at[:] = i + len(line), row + 1, turn, n, num_id_bytes + len(row_id)
    _, row, turn, n, num_id_bytes = (int(value) for value in at)
    return TurnBlock(
        text=text[:n],
        turn_start=turn_start[:turn],
        turn_end=turn_end[:turn],
        turn_row=turn_row[:turn] + first_row,
        turn_index=turn_index[:turn],
        first_row=first_row,
        num_rows=row,
        ids=ids[:num_id_bytes],
        id_offsets=id_end[: row + 1],
        line_start=line_start[:row] + offset,
        line_end=line_end[:row] + offset,
    )


def _line_length(data: np.ndarray, i: int) -> int:
    for start in range(i, len(data), 1 << 16):
        found = data[start : start + (1 << 16)].tobytes().find(b"\n")
        if found >= 0:
            return start + found + 1 - i
    return 0


def _row(line: bytes, where: str) -> tuple[bytes, list[tuple[int, str, bytes]]]:
    """(id, messages: index, role, text) of a line, by the rules of JSON in full."""
    try:
        row: Any = json.loads(line)
        parts = [row[name] for name in _PARTS if name in row]
        if not parts:
            raise KeyError(" or ".join(_PARTS))
        messages = [message for part in parts for message in part]
        return _utf8(row["id"]), [
            (index, str(message["role"]), _utf8(message["content"])) for index, message in enumerate(messages)
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{where}: not a normalised row, which has an `id` and `messages` (or `prompt`, `chosen`, `rejected`) of "
            f"`role` and `content` ({type(error).__name__}: {str(error)[:200]}); make a data set of the file first"
        ) from error


def _utf8(text: str) -> bytes:
    # Half a surrogate pair becomes U+FFFD, as in Java.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def _parquet_blocks(shard: Shard, roles: Sequence[str]) -> Iterator[tuple[TurnBlock, int]]:
    first_row = 0
    with pq.ParquetFile(shard.path) as file:
        names = set(file.schema_arrow.names)
        parts = [name for name in _PARTS if name in names]
        if not parts:
            raise ValueError(f"{shard.path}: no column {' or '.join(_PARTS)}; make a data set of the file first")
        columns = [*parts, *(["id"] if "id" in names else [])]
        before = sum(file.metadata.row_group(group).num_rows for group in range(shard.start))
        for group in range(shard.start, shard.end):
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=[group], columns=columns):
                yield _columns(batch, parts, roles, shard.path, first_row, before), group - shard.start
                first_row += batch.num_rows
    # The rows of an empty group, or none at all, still end the shard.
    yield _no_turns(first_row), shard.end - shard.start


def _columns(
    batch: pa.RecordBatch, parts: list[str], roles: Sequence[str], path: str, first_row: int, before: int
) -> TurnBlock:
    texts, starts, ends, rows, indices = [], [], [], [], []
    num_messages = np.zeros(batch.num_rows, np.int64)
    num_bytes = 0
    for name in parts:
        column = batch.column(name)
        if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
            raise ValueError(f"{path}: column {name!r} is no list of messages; make a data set of the file first")
        # flatten() and value_lengths() agree on slices and nulls, which offsets alone do not.
        messages = column.flatten()
        lengths = pc.fill_null(column.value_lengths(), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        row = np.repeat(np.arange(batch.num_rows), lengths)
        index = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + num_messages[row]
        num_messages += lengths
        if not pa.types.is_struct(messages.type) or {"role", "content"} - {field.name for field in messages.type}:
            raise ValueError(f"{path}: column {name!r} holds no messages of `role` and `content`")
        fields = dict(zip((field.name for field in messages.type), messages.flatten(), strict=True))
        content = fields["content"].cast(pa.large_string())
        wanted = pc.and_(
            pc.fill_null(pc.is_in(fields["role"].cast(pa.string()), pa.array(list(roles))), False), content.is_valid()
        ).to_numpy(zero_copy_only=False)
        offsets = np.frombuffer(content.buffers()[1], np.int64)[content.offset : content.offset + len(content) + 1]
        data = content.buffers()[2]
        texts.append(np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8))
        starts.append(offsets[:-1][wanted] + num_bytes)
        ends.append(offsets[1:][wanted] + num_bytes)
        rows.append(row[wanted])
        indices.append(index[wanted])
        num_bytes += len(texts[-1])
    order = np.lexsort((np.concatenate(indices), np.concatenate(rows)))
    if "id" in batch.schema.names:
        ids = [str(value).encode() for value in batch.column("id").to_pylist()]
    else:
        ids = [str(before + first_row + row).encode() for row in range(batch.num_rows)]
    return _no_turns(first_row)._replace(
        # Arrow's buffers cannot be written to, and a compiled loop is made for arrays of one kind.
        text=np.concatenate(texts),
        turn_start=np.concatenate(starts)[order],
        turn_end=np.concatenate(ends)[order],
        turn_row=np.concatenate(rows)[order] + first_row,
        turn_index=np.concatenate(indices)[order],
        num_rows=batch.num_rows,
        ids=np.frombuffer(bytearray(b"".join(ids)), np.uint8),
        id_offsets=np.concatenate([[0], np.cumsum([len(row_id) for row_id in ids])]).astype(np.int64),
        line_start=np.full(batch.num_rows, -1, np.int64),
        line_end=np.full(batch.num_rows, -1, np.int64),
    )


def _no_turns(first_row: int) -> TurnBlock:
    nothing = np.empty(0, np.int64)
    none = np.empty(0, np.uint8)
    return TurnBlock(
        none, nothing, nothing, nothing, nothing, first_row, 0, none, np.zeros(1, np.int64), nothing, nothing
    )
