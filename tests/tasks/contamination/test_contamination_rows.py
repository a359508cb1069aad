"""How the contamination scan reads a rows file."""

from __future__ import annotations

from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.tasks.contamination.rows import plan_shards, read_blocks
from smoltulu.tasks.data.rows import turns_of
from tests.rows_file import write_rows
from tests.tasks.contamination.contamination_fuzz import conversation


def turns_of_file(path, roles=("user",), shard_bytes=1 << 40):
    """(row, index, text) of every turn, and row ids."""
    turns, ids, before = [], [], 0
    for shard in plan_shards(path, shard_bytes):
        num_rows = 0
        for block in read_blocks(shard, roles):
            assert block.first_row == num_rows
            for start, end, row, index in zip(
                block.turn_start, block.turn_end, block.turn_row, block.turn_index, strict=True
            ):
                turns.append((before + int(row), int(index), block.text[start:end].tobytes().decode()))
            ids += [block.ids[a:b].tobytes().decode() for a, b in pairwise(block.id_offsets)]
            num_rows += block.num_rows
        before += num_rows
    return turns, ids


def expected_turns(rows, roles=("user",)):
    return [
        (number, index, message["content"])
        for number, row in enumerate(rows)
        for index, message in enumerate(turns_of(row))
        if message["role"] in roles
    ]


_message = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()})
_messages = st.lists(_message, max_size=3)
_rows = st.one_of(
    *(
        st.lists(
            st.fixed_dictionaries({"id": st.text(max_size=5), **dict.fromkeys(names, _messages)}),
            min_size=1,
            max_size=6,
        )
        for names in (("messages",), ("prompt", "chosen", "rejected"), ("prompt",))
    )
)


@settings(max_examples=150, deadline=None)
@given(_rows, st.integers(1, 200), st.integers(1, 4), st.booleans())
def test_turns_are_those_of_the_rows(tmp_path_factory, rows, shard_bytes, group_rows, both):
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet", rows, group_rows=group_rows)
    roles = ("user", "assistant") if both else ("user",)
    assert turns_of_file(path, roles, shard_bytes) == (expected_turns(rows, roles), [row["id"] for row in rows])


def test_a_row_larger_than_a_row_group_is_read_whole(tmp_path):
    rows = [
        conversation("0:0", "a"),
        conversation("0:1", "b c " * 6_000_000, "x"),
        conversation("0:2", "d", "y" * 9_000_000),
    ]
    path = write_rows(tmp_path / "rows.parquet", rows)
    assert [(shard.start, shard.end) for shard in plan_shards(path, 1)] == [(0, 1), (1, 2)]
    assert turns_of_file(path) == (expected_turns(rows), ["0:0", "0:1", "0:2"])


def test_shards_are_ranges_of_row_groups(tmp_path):
    rows = [conversation(f"0:{number}", "x" * 1000) for number in range(10)]
    path = write_rows(tmp_path / "rows.parquet", rows, group_rows=2)

    def bounds(shard_bytes):
        return [(shard.start, shard.end) for shard in plan_shards(path, shard_bytes)]

    assert bounds(1) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    # A group has 2,000 bytes of text and little else, compressed or not.
    assert bounds(4000) == [(0, 2), (2, 4), (4, 5)] and bounds(1 << 20) == [(0, 5)]
    assert {shard.num_shards for shard in plan_shards(path, 4000)} == {3}
    assert [(shard.start, shard.end) for shard in plan_shards(write_rows(tmp_path / "none", []))] == [(0, 0)]


def test_what_is_no_rows_file_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": ["a"], "messages": ["no list"]}), path)
    with pytest.raises(ValueError, match="no rows file"):
        plan_shards(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        plan_shards(path)
