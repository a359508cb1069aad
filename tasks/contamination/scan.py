"""Exact contamination scan of a shard of training rows against an index of benchmarks.

build_index;  plan_shards -> scan_shard (each by itself: thread, process or machine) -> merge
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smoltulu.schemas.contamination import BenchmarkIndexOutputs, Shard, ShardResult, ShortItems
from smoltulu.tasks.contamination.build import joined
from smoltulu.tasks.contamination.kernels.layout import FullPostings, NgramPostings, NormalTables, Phrases, State
from smoltulu.tasks.contamination.kernels.normal import ASCII_KINDS, ASCII_TO, locate_normalised
from smoltulu.tasks.contamination.kernels.scan import scan
from smoltulu.tasks.contamination.kernels.text import (
    LOWER_BYTES,
    LOWER_CODE_POINTS,
    are_most_of_their_lines,
    gather_texts,
    lines_of,
    locate_hits,
)
from smoltulu.tasks.contamination.rows import TurnBlock, read_blocks

_VERSION = 2  # of the shard results: raised when their meaning changes
_MATCH_CHARACTERS = 200
_HITS_AT_A_TIME = 1 << 18

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


@dataclass(frozen=True)
class ShortRule:
    """When a hit on a short instance counts: `short_items` of the rules, and under how many terms one is short."""

    rule: ShortItems = "never"
    min_terms: int = 1

    @property
    def schema(self) -> pa.Schema:
        """Columns of the hits."""
        return HITS_ALONE if self.rule == "alone" else HITS


@dataclass(frozen=True)
class Index:
    """An index folder, mapped into memory: threads and processes share its pages."""

    header: BenchmarkIndexOutputs
    digest: str
    phrases: Phrases
    full: FullPostings
    ngram: NgramPostings
    normal: NormalTables  # of no length in the other modes
    num_terms: np.ndarray  # of each instance, over its fields
    best_possible: np.ndarray  # score of each instance against a text that holds all that can be matched
    is_short: np.ndarray  # n-gram mode: instances looked for as a whole, as no window of theirs can be enough
    benchmark: np.ndarray  # number of each instance's benchmark
    benchmark_row: np.ndarray  # its row there

    @property
    def window(self) -> int:
        """Tokens of a window; 0: full mode."""
        return (self.header.ngram_size or 0) if self.header.mode == "ngram" else 0


def load_index(folder: Path) -> Index:
    """Map an index folder into memory. Raises ValueError if it is none."""
    file = folder / "index.json"
    if not file.is_file():
        raise ValueError(
            f"{folder}: no benchmark index (index.json is missing); make it with the benchmark_index stage"
        )
    header = json.loads(file.read_text(encoding="utf-8"))
    digest = header.pop("digest")

    def array(name: str) -> np.ndarray:
        # Copy on write: compiled loops are made for writable arrays, and nothing is ever written.
        return np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False).view(np.ndarray)

    def postings(mode: str, names: Sequence[str]) -> Iterator[np.ndarray]:
        is_there = (mode == "ngram") == (parsed.mode == "ngram") or (mode == "full" and parsed.short_items)
        return (array(f"{mode}_{name}") if is_there else np.zeros(1, np.int32) for name in names)

    parsed = BenchmarkIndexOutputs.model_validate(header)
    normal = NormalTables(
        *(np.empty(0, kind) for kind in (np.uint8, np.int32, np.int32, np.uint64, np.int64))
        if parsed.mode != "normalised"
        else (array(f"normal_{name}") for name in NormalTables._fields)
    )
    return Index(
        header=parsed,
        digest=digest,
        phrases=Phrases(*(array(f"phrases_{name}") for name in Phrases._fields)),
        full=FullPostings(*postings("full", FullPostings._fields)),
        ngram=NgramPostings(*postings("ngram", NgramPostings._fields)),
        normal=normal,
        num_terms=array("num_terms"),
        best_possible=array("best_possible"),
        is_short=array("is_short") if parsed.short_items else np.zeros(parsed.num_instances, bool),
        benchmark=array("benchmark"),
        benchmark_row=array("benchmark_row"),
    )


def new_state(index: Index) -> State:
    """The state of one scan. Threads must not share it."""
    num_instances = index.header.num_instances
    num_fields = len(index.ngram.field_tokens) if index.window else 0
    return State(
        clock=np.zeros(1, np.int64),
        seen=np.zeros((index.header.num_phrases, 2), np.int32),
        field_mark=np.zeros((num_fields, 3), np.int32),
        instance_mark=np.zeros(num_instances, np.int32),
        best_score=np.zeros(num_instances, np.float64),
        best_row=np.full(num_instances, -1, np.int64),
    )


def scan_shard(
    index_folder: Path,
    shard: Shard,
    folder: Path,
    *,
    roles: Sequence[str] = ("user",),
    match_threshold: float = 0.5,
    short: ShortRule = ShortRule(),
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
    with pq.ParquetWriter(partial / "hits.parquet", short.schema, compression="zstd") as writer:
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
        turn, places, scores, oversized = _scan(
            index, state, block.text, block.turn_start, block.turn_end, block.turn_row, turn, match_threshold
        )
        if turn < 0:
            row = int(block.turn_row[-1 - turn])
            raise ValueError(f"{path}: row {row} of the part that is scanned is not UTF-8; convert the file")
        yield _table(index, state, block, places, scores, short), len(oversized)


def _scan(
    index: Index,
    state: State,
    text: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    rows: np.ndarray,
    first: int,
    match_threshold: float,
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """The compiled scan of text[starts:ends] from number `first` on."""
    found: tuple[int, np.ndarray, np.ndarray, np.ndarray] = scan(
        text, starts, ends, rows, first, index.phrases, index.full, index.ngram, index.window, match_threshold, state,
        LOWER_BYTES, LOWER_CODE_POINTS, index.normal, ASCII_KINDS, ASCII_TO, _HITS_AT_A_TIME,
    )  # fmt: skip
    return found


def _table(
    index: Index, state: State, block: TurnBlock, places: np.ndarray, scores: np.ndarray, short: ShortRule
) -> pa.Table:
    """One line per row and instance, its first turn of the highest score; of the rule `alone`, one that counts."""
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
    begins, ends = _match_bounds(index, block.text, block.turn_start, block.turn_end, places[order])
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
    return pa.Table.from_arrays(
        [pa.array(array, field.type) for array, field in zip(arrays, short.schema, strict=True)], schema=short.schema
    )


def alone(index: Index, block: TurnBlock, places: np.ndarray, short: ShortRule) -> np.ndarray:
    """Whether each place is of an instance that is not short, or that makes up most of the lines it stands on."""
    instances, num_instances = places[:, 1], index.header.num_instances
    turns, found, _, _ = _alone(index, block, places, short)
    return ~is_short(index, instances, short) | np.isin(
        places[:, 0] * num_instances + instances, turns * num_instances + found
    )


def is_short(index: Index, instances: np.ndarray, short: ShortRule) -> np.ndarray:
    """Which of these instances are short."""
    return np.asarray((index.num_terms[instances] < short.min_terms) | index.is_short[instances])


def _alone(
    index: Index, block: TurnBlock, places: np.ndarray, short: ShortRule
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Short instances that make up most of their lines: (turn, instance, first byte, byte behind the last).

    Every line of a turn with a hit on a short one is searched by itself too: it may stand alone further down.
    """
    where = (block.text, block.turn_start, block.turn_end)
    places = places[is_short(index, places[:, 1], short)]
    starts, ends, of_turn = lines_of(*where, np.unique(places[:, 0]))
    found = [(places[:, 0], places, where)]
    state, line = new_state(index), 0
    while line < len(starts):
        line, in_lines, _, _ = _scan(index, state, block.text, starts, ends, np.arange(len(starts)), line, 0.999)
        assert line >= 0, "what stands between line feeds of UTF-8 is UTF-8"
        in_lines = in_lines[is_short(index, in_lines[:, 1], short)]
        found.append((of_turn[in_lines[:, 0]], in_lines, (block.text, starts, ends)))
    columns = []
    for turns, here, around in found:
        bounds = _match_bounds(index, *around, here)
        is_most = are_most_of_their_lines(*around, here[:, 0], *bounds)
        columns.append([turns[is_most], here[is_most, 1], bounds[0][is_most], bounds[1][is_most]])
    turns, instances, begins, ends = map(np.concatenate, zip(*columns, strict=True))
    return turns, instances, begins, ends


def spans(
    index: Index, texts: Sequence[str], match_threshold: float, short: ShortRule
) -> Iterator[tuple[int, int, int]]:
    """(number of the text, first byte in it, byte behind the last) of hits that count, at least one if there is any."""
    block, state, turn = block_of(texts), new_state(index), 0
    where = (block.text, block.turn_start, block.turn_end)
    while turn < len(texts):
        turn, places, _, _ = _scan(index, state, *where, block.turn_row, turn, match_threshold)
        assert turn >= 0, "str encodes as UTF-8"
        is_not_short = ~is_short(index, places[:, 1], short) if short.rule != "always" else np.ones(len(places), bool)
        begins, ends = _match_bounds(index, *where, places[is_not_short])
        turns = places[is_not_short, 0]
        if short.rule == "alone":
            more = _alone(index, block, places, short)
            turns, begins, ends = (
                np.concatenate(pair) for pair in ((turns, more[0]), (begins, more[2]), (ends, more[3]))
            )
        before = block.turn_start[turns]
        yield from zip(turns.tolist(), (begins - before).tolist(), (ends - before).tolist(), strict=True)


def _match_bounds(
    index: Index, text: np.ndarray, turn_start: np.ndarray, turn_end: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Source bytes of the matches, in the order of `places`."""
    by_turn = np.argsort(places[:, 0], kind="stable")
    begins, ends = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
    where = (text, turn_start, turn_end, places[by_turn])
    begins[by_turn], ends[by_turn] = (
        locate_normalised(*where, index.normal)
        if index.header.mode == "normalised"
        else locate_hits(*where, LOWER_BYTES, LOWER_CODE_POINTS)
    )
    return begins, ends


def _strings(source: np.ndarray, begins: np.ndarray, ends: np.ndarray, max_characters: int) -> pa.Array:
    data, offsets = gather_texts(source, begins, ends, max_characters)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_string(), len(begins), buffers).cast(pa.string())


def scan_texts(
    index: Index,
    texts: Sequence[str],
    match_threshold: float = 0.5,
    short: ShortRule = ShortRule(),
) -> tuple[pa.Table, np.ndarray]:
    """Texts in memory, each a row of one turn: their hits, and the best score of each instance.

    In n-gram mode the scores at or below the threshold are kept too.
    """
    block = block_of(texts)
    state = new_state(index)
    tables = [hits for hits, _ in _block_hits(index, state, block, match_threshold, short, "texts in memory")]
    return pa.concat_tables([short.schema.empty_table(), *tables]), state.best_score


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
