"""How the contamination scan reads rows: JSON lines as json reads them, and Parquet."""

from __future__ import annotations

import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.tasks.contamination.rows import read_blocks
from smoltulu.tasks.contamination.scan import plan_shards
from tests.tasks.contamination.contamination_fuzz import conversation


def turns_of(path, roles=("user",), shard_bytes=1 << 40):
    """(row, index, text) of every turn, row ids, and lines by their byte ranges."""
    turns, ids, lines, before = [], [], [], 0
    data = path.read_bytes()
    for shard in plan_shards(path, shard_bytes):
        num_rows = 0
        for block, _ in read_blocks(shard, roles):
            for start, end, row, index in zip(
                block.turn_start, block.turn_end, block.turn_row, block.turn_index, strict=True
            ):
                turns.append((before + int(row), int(index), block.text[start:end].tobytes().decode()))
            bounds = block.id_offsets
            ids += [block.ids[a:b].tobytes().decode() for a, b in pairwise(bounds)]
            lines += [data[start:end] for start, end in zip(block.line_start, block.line_end, strict=True)]
            num_rows += block.num_rows
        before += num_rows
    return turns, ids, lines


def expected_turns(rows, roles=("user",)):
    return [
        (number, index, message["content"])
        for number, row in enumerate(rows)
        for index, message in enumerate(
            message for name in ("messages", "prompt", "chosen", "rejected") for message in row.get(name, ())
        )
        if message["role"] in roles
    ]


_message = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()})
_messages = st.lists(_message, max_size=3)
_rows = st.lists(
    st.one_of(
        st.fixed_dictionaries({"id": st.text(max_size=5), "messages": _messages}),
        st.fixed_dictionaries(
            {"id": st.text(max_size=5), "prompt": _messages, "chosen": _messages, "rejected": _messages}
        ),
        st.fixed_dictionaries(
            {"id": st.text(max_size=5), "prompt": _messages, "verifier": st.text(), "n": st.floats(-1, 1)}
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(_rows, st.booleans(), st.sampled_from([(",", ":"), (", ", ": ")]), st.integers(1, 200), st.booleans())
def test_rows_are_read_as_json_reads_them(tmp_path_factory, rows, ascii_only, separators, shard_bytes, both):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = [json.dumps(row, ensure_ascii=ascii_only, separators=separators) + "\n" for row in rows]
    path.write_bytes("".join(text).encode())
    roles = ("user", "assistant") if both else ("user",)
    assert turns_of(path, roles, shard_bytes) == (
        expected_turns(rows, roles), [row["id"] for row in rows], [line.encode() for line in text]
    )  # fmt: skip


def test_unusual_lines_are_left_to_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        b'{"id": "a", "messages": [{"\\u0072ole": "user", "content": "one"}]}\n',  # an escape in a key
        b'  {"messages":[{"content":"t\\u0077o\\ud83d\\ude00","name":{"x":["}"]},"role":"user"}],"id":"b\\n"}  \r\n',
        b"\n",
        b'{"id": "c", "messages": [{"role": "\\u0075ser", "content": "three"}], "messages": []}\n',  # the last
        b'{"id": "d", "rejected": [], "prompt": [{"role": "user", "content": "half \\ud83d!"}], "chosen": []}',
    ]
    path.write_bytes(b"".join(lines))
    expected = [(0, 0, "one"), (1, 0, "two\U0001f600"), (3, 0, "half \ufffd!")]
    turns, ids, found = turns_of(path)
    assert (turns, ids) == (expected, ["a", "b\n", "c", "d"])
    assert b"".join(found) == b"".join(lines).replace(b"\n\n", b"\n")


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b'{"id": "a"}',
        b'{"messages": []}',
        b'{"id": "a", "messages": [{"role": "user"}]}',
        b'{"id": "a", "messages": [{"role": "user", "content": 3}]}',
        b'{"id": "a", "messages": []} x',
        b'{"id": 1, "messages": []}',
        b'{"id": "a", "mess',
    ],
)
def test_what_is_no_normalised_row_is_refused_with_its_place(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    good = b'{"id": "0:0", "messages": []}\n'
    path.write_bytes(good + line + b"\n")
    with pytest.raises(ValueError, match=rf"rows.jsonl, byte {len(good)}: not a normalised row"):
        turns_of(path)


def test_a_row_larger_than_a_block_is_read_whole(tmp_path):
    rows = [
        conversation("0:0", "a"),
        conversation("0:1", "b c " * 3_000_000, "x"),
        conversation("0:2", "d", "y" * 9_000_000),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns, ids, _ = turns_of(path)
    assert turns == expected_turns(rows) and ids == ["0:0", "0:1", "0:2"]


def parquet_rows():
    """Slices, nulls, several chunks: what offsets alone get wrong."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    rows = [
        [{"role": "user", "content": "sliced away"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "\u00e9 one"}],
        None,
        [],
        [{"role": "user", "content": None}, {"role": None, "content": "x"}, {"role": "user", "content": "two"}],
        [{"role": "assistant", "content": "a"}, {"role": "user", "content": ""}],
    ]
    table = pa.table({"id": [f"r{n}" for n in range(len(rows))], "messages": pa.array(rows, pa.list_(message))})
    return pa.concat_tables([table.slice(1, 2), table.slice(3)])


def test_parquet_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(parquet_rows(), path, row_group_size=2)
    assert [(shard.start, shard.end) for shard in plan_shards(path, 1)] == [(0, 1), (1, 2), (2, 3)]
    for shard_bytes in (1, 1 << 30):
        turns = [
            (int(row), int(index), block.text[start:end].tobytes().decode())
            for shard in plan_shards(path, shard_bytes)
            for block, _ in read_blocks(shard, ("user",))
            for start, end, row, index in zip(
                block.turn_start, block.turn_end, block.turn_row, block.turn_index, strict=True
            )
        ]
        assert [turn[1:] for turn in turns] == [(1, "\u00e9 one"), (2, "two"), (1, "")]
    pq.write_table(pa.table({"messages": ["no list"]}), path)
    with pytest.raises(ValueError, match="no list of messages"):
        list(read_blocks(plan_shards(path)[0], ("user",)))
