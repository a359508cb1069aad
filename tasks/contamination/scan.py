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

from smoltulu.schemas.contamination import BenchmarkIndexOutputs, Shard, ShardResult
from smoltulu.tasks.contamination.build import joined
from smoltulu.tasks.contamination.kernels.layout import FullPostings, NgramPostings, Phrases, State
from smoltulu.tasks.contamination.kernels.scan import scan
from smoltulu.tasks.contamination.kernels.text import LOWER_BYTES, LOWER_CODE_POINTS, gather_texts, locate_hits
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


@dataclass(frozen=True)
class Index:
    """An index folder, mapped into memory: threads and processes share its pages."""

    header: BenchmarkIndexOutputs
    digest: str
    phrases: Phrases
    full: FullPostings
    ngram: NgramPostings
    num_terms: np.ndarray  # of each instance, over its fields
    best_possible: np.ndarray  # score of each instance against a text that holds all that can be matched
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
        return (array(f"{mode}_{name}") if mode == parsed.mode else np.zeros(1, np.int32) for name in names)

    parsed = BenchmarkIndexOutputs.model_validate(header)
    return Index(
        header=parsed,
        digest=digest,
        phrases=Phrases(*(array(f"phrases_{name}") for name in Phrases._fields)),
        full=FullPostings(*postings("full", FullPostings._fields)),
        ngram=NgramPostings(*postings("ngram", NgramPostings._fields)),
        num_terms=array("num_terms"),
        best_possible=array("best_possible"),
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
    report: Callable[[int], None] | None = None,
) -> ShardResult:
    """Scan one shard into `folder`/shard-NNNNN. A whole result of the same input that is there is returned at once.

    Args:
        index_folder: made by `build_index`.
        shard: from `plan_shards`.
        folder: of the results; its file system must hold rename atomic.
        roles: whose turns are searched.
        match_threshold: n-gram mode: share of an instance's tokens that is not yet contaminated.
        report: called from time to time with the number of rows scanned so far.

    Raises:
        ValueError: no rows file, or text that is not UTF-8.
    """
    index = load_index(index_folder)
    target = folder / f"shard-{shard.number:05d}"
    fingerprint = _fingerprint(index, shard, roles, match_threshold)
    finished = _finished(target, fingerprint)
    if finished is not None:
        return finished
    partial = folder / f"{target.name}.{os.getpid()}.partial"
    for leftover in (target, partial):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    state = new_state(index)
    num_rows = num_turns = num_bytes = num_hits = num_oversized = 0
    with pq.ParquetWriter(partial / "hits.parquet", HITS, compression="zstd") as writer:
        for block in read_blocks(shard, roles):
            for hits, oversized in _block_hits(index, state, block, match_threshold, shard.path):
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


def _fingerprint(index: Index, shard: Shard, roles: Sequence[str], match_threshold: float) -> str:
    """What a result depends on, so that a rerun on other data, rules or code never takes it for its own."""
    status = os.stat(shard.path)
    parts = [_VERSION, index.digest, shard.start, shard.end, shard.num_shards, sorted(roles), match_threshold]
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
    index: Index, state: State, block: TurnBlock, match_threshold: float, path: str
) -> Iterator[tuple[pa.Table, int]]:
    """(hits of whole rows, number of turns with an oversized term), a bounded number of hits at a time."""
    turn = 0
    while turn < len(block.turn_row):
        turn, places, scores, oversized = scan(
            block.text, block.turn_start, block.turn_end, block.turn_row, turn, index.phrases, index.full, index.ngram,
            index.window, match_threshold, state, LOWER_BYTES, LOWER_CODE_POINTS, _HITS_AT_A_TIME,
        )  # fmt: skip
        if turn < 0:
            row = int(block.turn_row[-1 - turn])
            raise ValueError(f"{path}: row {row} of the part that is scanned is not UTF-8; convert the file")
        yield _table(index, block, places, scores), len(oversized)


def _table(index: Index, block: TurnBlock, places: np.ndarray, scores: np.ndarray) -> pa.Table:
    """One line per row and instance, its first turn of the highest score."""
    row, instance = block.turn_row[places[:, 0]], places[:, 1]
    order = np.lexsort((places[:, 0], -scores, instance, row))
    row, instance = row[order], instance[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (row[1:] != row[:-1]) | (instance[1:] != instance[:-1])
    row, instance, order = row[is_first], instance[is_first], order[is_first]
    begins, ends = _match_bounds(block.text, block.turn_start, block.turn_end, places[order])
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
    ]
    return pa.Table.from_arrays(
        [pa.array(array, field.type) for array, field in zip(arrays, HITS, strict=True)], schema=HITS
    )


def _match_bounds(
    text: np.ndarray, turn_start: np.ndarray, turn_end: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Source bytes of the matches, in the order of `places`."""
    by_turn = np.argsort(places[:, 0], kind="stable")
    begins, ends = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
    begins[by_turn], ends[by_turn] = locate_hits(
        text, turn_start, turn_end, places[by_turn], LOWER_BYTES, LOWER_CODE_POINTS
    )
    return begins, ends


def _strings(source: np.ndarray, begins: np.ndarray, ends: np.ndarray, max_characters: int) -> pa.Array:
    data, offsets = gather_texts(source, begins, ends, max_characters)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_string(), len(begins), buffers).cast(pa.string())


def scan_texts(index: Index, texts: Sequence[str], match_threshold: float = 0.5) -> tuple[pa.Table, np.ndarray]:
    """Texts in memory, each a row of one turn: their hits (`HITS`), and the best score of each instance.

    In n-gram mode the scores at or below the threshold are kept too.
    """
    source, offsets = joined([text.encode() for text in texts])
    block = TurnBlock(
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
    state = new_state(index)
    tables = [hits for hits, _ in _block_hits(index, state, block, match_threshold, "texts in memory")]
    return pa.concat_tables([HITS.empty_table(), *tables]), state.best_score
