"""Exact contamination scan of a shard of training rows against an index of benchmarks.

build_index;  plan_shards -> scan_shard (each by itself: thread, process or machine) -> merge
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smoltulu.schemas.contamination import Shard, ShardResult
from smoltulu.tasks.contamination.build import joined
from smoltulu.tasks.contamination.kernels.layout import State
from smoltulu.tasks.contamination.kernels.text import gather_texts
from smoltulu.tasks.contamination.opened import Index, load_index, match_bounds, new_state, other_fields, scan_turns
from smoltulu.tasks.contamination.rows import TurnBlock, read_blocks
from smoltulu.tasks.contamination.standing import (
    ALL_COUNT,
    ShortRule,
    alone,
    confirmed,
    short_instances,
    standing_alone,
)

_VERSION = 2  # of the shard results: raised when their meaning changes
_MATCH_CHARACTERS = 200

HITS = pa.schema(
    [
        ("row", pa.int64()),
        ("row_id", pa.string()),
        ("turn", pa.int32()),
        ("instance", pa.int32()),
        ("benchmark", pa.string()),
        ("benchmark_row", pa.int32()),
        ("score", pa.float64()),
        ("num_terms", pa.int32()),
        ("text", pa.string()),
    ]
)


#: With the rule `alone` for short items: whether the instance makes up most of the lines that it stands on.
HITS_ALONE = HITS.append(pa.field("is_alone", pa.bool_()))


def hits_schema(short: ShortRule) -> pa.Schema:
    """Columns of the hits."""
    return HITS_ALONE if short.rule == "alone" else HITS


def scan_shard(
    index_folder: Path,
    shard: Shard,
    folder: Path,
    *,
    roles: Sequence[str] = ("user",),
    match_threshold: float = 0.5,
    short: ShortRule = ALL_COUNT,
    report: Callable[[int], None] | None = None,
) -> ShardResult:
    """Scan one shard into `folder`/shard-NNNNN. A whole result of the same input that is there is returned at once.

    Args:
        index_folder: made by `build_index`.
        shard: from `plan_shards`.
        folder: of the results; its file system must hold rename atomic.
        roles: whose turns are searched.
        match_threshold: n-gram mode: share of an instance's tokens that is not yet contaminated.
        short: when a hit on a short instance counts.
        report: called from time to time with the number of rows scanned so far.

    Raises:
        ValueError: no rows file, or text that is not UTF-8.
    """
    index = load_index(index_folder)
    target = folder / f"shard-{shard.number:05d}"
    fingerprint = _fingerprint(index, shard, roles, match_threshold, short)
    finished = _finished(target, fingerprint)
    if finished is not None:
        return finished
    partial = folder / f"{target.name}.{os.getpid()}.partial"
    for leftover in (target, partial):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    state = new_state(index)
    num_rows = num_turns = num_bytes = num_hits = num_oversized = 0
    with pq.ParquetWriter(partial / "hits.parquet", hits_schema(short), compression="zstd") as writer:
        for block in read_blocks(shard, roles):
            for hits, oversized in _block_hits(index, state, block, match_threshold, short, shard.path):
                num_oversized += oversized
                num_hits += len(hits)
                if len(hits):
                    writer.write_table(hits, row_group_size=len(hits))  # rows stay whole
            num_rows += block.num_rows
            num_turns += len(block.turn_row)
            num_bytes += int((block.turn_end - block.turn_start).sum())
            if report:
                report(num_rows)
    scored = np.flatnonzero(state.best_score > 0)
    np.savez(
        partial / "best.npz",
        instance=scored,
        score=state.best_score[scored],
        row=state.best_row[scored],
        allow_pickle=False,
    )
    result = ShardResult(
        folder=str(target),
        number=shard.number,
        num_shards=shard.num_shards,
        num_rows=num_rows,
        num_turns=num_turns,
        num_bytes=num_bytes,
        num_hits=num_hits,
        num_oversized_terms=num_oversized,
    )
    (partial / "result.json").write_text(json.dumps({"fingerprint": fingerprint, **result.model_dump()}))
    os.replace(partial, target)
    return result


def _fingerprint(index: Index, shard: Shard, roles: Sequence[str], match_threshold: float, short: ShortRule) -> str:
    """What a result depends on, so that a rerun on other data, rules or code never takes it for its own."""
    status = os.stat(shard.path)
    parts = [_VERSION, index.digest, shard.start, shard.end, shard.num_shards, sorted(roles), match_threshold]
    if short.rule != "never":
        parts += [short.rule, short.min_terms]
    text = json.dumps([*parts, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(target: Path, fingerprint: str) -> ShardResult | None:
    try:
        record = json.loads((target / "result.json").read_text())
    except (OSError, ValueError):
        return None
    if record.pop("fingerprint", None) != fingerprint:
        return None
    return ShardResult.model_validate({**record, "folder": str(target)})


def _block_hits(
    index: Index, state: State, block: TurnBlock, match_threshold: float, short: ShortRule, path: str
) -> Iterator[tuple[pa.Table, int]]:
    """(hits of whole rows, number of turns with an oversized term), a bounded number of hits at a time."""
    turn = 0
    while turn < len(block.turn_row):
        turn, places, scores, oversized = scan_turns(
            index, state, block.text, block.turn_start, block.turn_end, block.turn_row, turn, match_threshold
        )
        if turn < 0:
            row = int(block.turn_row[-1 - turn])
            raise ValueError(f"{path}: row {row} of the part that is scanned is not UTF-8; convert the file")
        bounds = None
        if index.weak is not None:
            places, scores, *bounds = confirmed(index, index.weak, state, block, places, scores)
        yield _table(index, state, block, places, scores, short, bounds), len(oversized)


def _table(
    index: Index,
    state: State,
    block: TurnBlock,
    places: np.ndarray,
    scores: np.ndarray,
    short: ShortRule,
    bounds: list[np.ndarray] | None,
) -> pa.Table:
    """One line per row and instance, its first turn of the highest score; of the rule `alone`, one that counts.

    `bounds`: source bytes of all places, where they are known.
    """
    is_alone = np.ones(len(places), dtype=bool)
    if short.rule == "alone":
        is_alone = alone(index, block, places, short)
        kept = is_alone | ~index.is_short[places[:, 1]]
        places, scores, is_alone = places[kept], scores[kept], is_alone[kept]
    if index.is_short.any():  # no window has scored these: their best is that of the hits that are left
        of_short = index.is_short[places[:, 1]]
        state.best_score[places[of_short, 1]] = np.maximum(state.best_score[places[of_short, 1]], scores[of_short])
    row, instance = block.turn_row[places[:, 0]], places[:, 1]
    order = np.lexsort((places[:, 0], ~is_alone, -scores, instance, row))
    row, instance = row[order], instance[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (row[1:] != row[:-1]) | (instance[1:] != instance[:-1])
    row, instance, order = row[is_first], instance[is_first], order[is_first]
    if bounds is None:
        begins, ends = match_bounds(index, block.text, block.turn_start, block.turn_end, places[order])
    else:
        begins, ends = (array[order] for array in bounds)
    in_block = row - block.first_row
    names = pa.array([benchmark.name for benchmark in index.header.benchmarks], pa.string())
    arrays = [
        row,
        _strings(block.ids, block.id_offsets[in_block], block.id_offsets[in_block + 1], 1 << 30),
        block.turn_index[places[order, 0]].astype(np.int32),
        instance.astype(np.int32),
        names.take(pa.array(index.benchmark[instance])),
        index.benchmark_row[instance],
        scores[order],
        index.num_terms[instance],
        _strings(block.text, begins, ends, _MATCH_CHARACTERS),
        *([is_alone[order]] if short.rule == "alone" else []),
    ]
    schema = hits_schema(short)
    return pa.Table.from_arrays(
        [pa.array(array, field.type) for array, field in zip(arrays, schema, strict=True)], schema=schema
    )


def spans(
    index: Index, texts: Sequence[str], match_threshold: float, short: ShortRule
) -> Iterator[tuple[int, int, int]]:
    """(number of the text, first byte in it, byte behind the last) of hits that count, at least one if there is any.

    Of an instance of several fields, each of them.
    """
    block, state, turn = block_of(texts), new_state(index), 0
    where = (block.text, block.turn_start, block.turn_end)
    while turn < len(texts):
        turn, places, scores, _ = scan_turns(index, state, *where, block.turn_row, turn, match_threshold)
        assert turn >= 0, "str encodes as UTF-8"
        if index.weak is not None:
            places = confirmed(index, index.weak, state, block, places, scores)[0]
        shorts = short_instances(index, short)
        is_not_short = ~shorts[places[:, 1]] if short.rule != "always" else np.ones(len(places), bool)
        counted = places[is_not_short]
        found = [(counted[:, 0], *match_bounds(index, *where, counted))]
        if short.rule == "alone":
            alone_in, instances, begins, ends = standing_alone(index, block, places, shorts)
            found.append((alone_in, begins, ends))
            counted = np.concatenate([counted[:, :2], np.stack([alone_in, instances], axis=1)])
        found.append(other_fields(index, block, counted))
        turns, begins, ends = (np.concatenate(column) for column in zip(*found, strict=True))
        before = block.turn_start[turns]
        yield from zip(turns.tolist(), (begins - before).tolist(), (ends - before).tolist(), strict=True)


def _strings(source: np.ndarray, begins: np.ndarray, ends: np.ndarray, max_characters: int) -> pa.Array:
    data, offsets = gather_texts(source, begins, ends, max_characters)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_string(), len(begins), buffers).cast(pa.string())


def scan_texts(
    index: Index,
    texts: Sequence[str],
    match_threshold: float = 0.5,
    short: ShortRule = ALL_COUNT,
) -> tuple[pa.Table, np.ndarray]:
    """Texts in memory, each a row of one turn: their hits, and the best score of each instance.

    In n-gram mode the scores at or below the threshold are kept too.
    """
    block = block_of(texts)
    state = new_state(index)
    tables = [hits for hits, _ in _block_hits(index, state, block, match_threshold, short, "texts in memory")]
    return pa.concat_tables([hits_schema(short).empty_table(), *tables]), state.best_score


def block_of(texts: Sequence[str]) -> TurnBlock:
    """Texts in memory, each a row of one turn."""
    source, offsets = joined([text.encode() for text in texts])
    return TurnBlock(
        text=source,
        turn_start=offsets[:-1],
        turn_end=offsets[1:],
        turn_row=np.arange(len(texts)),
        turn_index=np.zeros(len(texts), np.int64),
        first_row=0,
        num_rows=len(texts),
        ids=np.empty(0, np.uint8),
        id_offsets=np.zeros(len(texts) + 1, np.int64),
    )
