"""Turns of a rows file in blocks, as byte buffers: a block is a row group.

The text of a turn is all that it says (`turn_text`): reasoning and calls, too. What a row says of its tools is one more
turn of the system, behind the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smoltulu.schemas.contamination import Shard
from smoltulu.tasks.data.rows import TOOLS, TURNS, given_row, is_rich_file, open_rows, tools_text, turn_text


class TurnBlock(NamedTuple):
    """Turns in the order of their rows. Rows are numbered within the shard."""

    text: np.ndarray  # uint8
    turn_start: np.ndarray  # int64: turn t is text[turn_start[t]:turn_end[t]]
    turn_end: np.ndarray  # int64
    turn_row: np.ndarray  # int64
    turn_index: np.ndarray  # int64: number in `texts_of`; prompt, chosen and rejected are counted through
    first_row: int
    num_rows: int
    ids: np.ndarray  # uint8
    id_offsets: np.ndarray  # int64, by row of the block


def plan_shards(path: Path, shard_bytes: int = 64 << 20) -> list[Shard]:
    """Ranges of row groups of about `shard_bytes`, uncompressed. Raises ValueError as `open_rows`."""
    bounds, gathered = [0], 0
    with open_rows(path) as opened:
        num_groups = opened.metadata.num_row_groups
        for group in range(num_groups):
            gathered += opened.metadata.row_group(group).total_byte_size
            if gathered >= shard_bytes or group == num_groups - 1:
                bounds.append(group + 1)
                gathered = 0
    pairs = list(pairwise(bounds)) or [(0, 0)]
    return [
        Shard(path=str(path), number=number, num_shards=len(pairs), start=start, end=end)
        for number, (start, end) in enumerate(pairs)
    ]


def read_blocks(shard: Shard, roles: Sequence[str]) -> Iterator[TurnBlock]:
    """The turns of these roles in each row group of the shard. Raises ValueError as `open_rows`."""
    first_row = 0
    with open_rows(Path(shard.path)) as opened:
        turns = [name for name in TURNS if name in opened.schema_arrow.names]
        more = [TOOLS] if is_rich_file(opened) else []
        for group in range(shard.start, shard.end):
            table = opened.read_row_group(group, columns=["id", *turns, *more], use_threads=False).combine_chunks()
            columns = [table.column(name).chunk(0) for name in turns]
            columns += [_tools_as_turns(table.column(name).chunk(0)) for name in more]
            yield _block(columns, table.column("id").chunk(0), roles, first_row)
            first_row += table.num_rows


def _tools_as_turns(tools: pa.StringArray) -> pa.ListArray:
    """What rows say of their tools, each a turn of the system; none where a row has none."""
    texts = [tools_text(given_row({TOOLS: text})[TOOLS]) if text else "" for text in tools.to_pylist()]
    offsets = np.concatenate(([0], np.cumsum([bool(text) for text in texts]))).astype(np.int32)
    said = pa.array([text for text in texts if text], pa.string())
    turns = pa.StructArray.from_arrays([pa.array(["system"] * len(said), pa.string()), said], ["role", "content"])
    return pa.ListArray.from_arrays(offsets, turns)


def _block(columns: list[pa.ListArray], ids: pa.StringArray, roles: Sequence[str], first_row: int) -> TurnBlock:
    """One row group: its columns of turns, of which a row's messages follow each other, and its ids."""
    texts, starts, ends, rows, indices = [], [], [], [], []
    num_messages = np.zeros(len(ids), np.int64)
    num_bytes = 0
    for column in columns:
        lengths = np.diff(column.offsets.to_numpy())
        row = np.repeat(np.arange(len(ids)), lengths)
        index = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + num_messages[row]
        num_messages += lengths
        role, content = (column.values.field(name) for name in ("role", "content"))
        if column.values.type.num_fields > 2:
            content = _whole_texts(column.values, content)
        is_wanted = pc.is_in(role, pa.array(roles)).to_numpy(zero_copy_only=False)
        text, offsets = _bytes(content)
        texts.append(text)
        starts.append(offsets[:-1][is_wanted] + num_bytes)
        ends.append(offsets[1:][is_wanted] + num_bytes)
        rows.append(row[is_wanted])
        indices.append(index[is_wanted])
        num_bytes += len(text)
    order = np.lexsort((np.concatenate(indices), np.concatenate(rows)))
    id_text, id_offsets = _bytes(ids)
    return TurnBlock(
        # Copied: Arrow's buffers cannot be written to, and a compiled loop is made for arrays of one kind.
        text=np.concatenate(texts),
        turn_start=np.concatenate(starts)[order],
        turn_end=np.concatenate(ends)[order],
        turn_row=np.concatenate(rows)[order] + first_row,
        turn_index=np.concatenate(indices)[order],
        first_row=first_row,
        num_rows=len(ids),
        ids=id_text.copy(),
        id_offsets=id_offsets,
    )


def _whole_texts(turns: pa.StructArray, content: pa.StringArray) -> pa.StringArray:
    """The text of each turn of a rich file. Few have more than content, so only those leave Arrow."""
    num_calls = pc.list_value_length(turns.field("tool_calls"))
    has_more = pc.or_(pc.not_equal(turns.field("reasoning_content"), ""), pc.greater(num_calls, 0))
    places = np.flatnonzero(has_more.to_numpy(zero_copy_only=False))
    if not len(places):
        return content
    more = turns.take(pa.array(places)).to_pylist()
    texts = pa.array([turn_text(turn) for turn in given_row({"messages": more})["messages"]], pa.string())
    return pc.replace_with_mask(content, has_more, texts)


def _bytes(texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 of all texts, and int64 offsets: text n is [offsets[n], offsets[n + 1]). The array is whole, no slice."""
    _, offsets, data = texts.buffers()
    assert texts.offset == 0
    text = np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
    return text, np.frombuffer(offsets, np.int32)[: len(texts) + 1].astype(np.int64)
