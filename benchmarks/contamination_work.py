"""Inputs and timed work of benchmarks/contamination.py, each function in a process of its own.

    python benchmarks/contamination_work.py FUNCTION '{"argument": value}'

Prints what the function returns, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

MB = 1e6
PEER_STEP = 8  # peers get every so many-th row: they take minutes for what takes us a second


def peak_rss_mb() -> float:
    """Of this process. (ru_maxrss would begin with what the parent had.)"""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1000 for line in status.splitlines() if line.startswith("VmHWM"))


# Input.


def real_rows() -> Iterator[dict[str, Any]]:
    """Training rows of `real-small`, in the normalised form, with the known leak."""
    from smoltulu.flows.recipe import load_recipe
    from smoltulu.tasks.data.formats import MalformedRow, adapt
    from smoltulu.tasks.data.sources import read_rows

    recipe = load_recipe("real-small")
    assert recipe.contamination and recipe.contamination.audit and recipe.data.sft
    for data in (recipe.data.sft, recipe.contamination.audit):
        for source in data.sources:
            for row in read_rows(source):
                try:
                    yield adapt(row, source)
                except MalformedRow:
                    continue


def load_benchmarks() -> list[Any]:
    """The twelve of `real-small`."""
    from smoltulu.flows.recipe import load_recipe
    from smoltulu.tasks.contamination.index import load_benchmark

    recipe = load_recipe("real-small")
    assert recipe.contamination
    return [load_benchmark(benchmark) for benchmark in recipe.contamination.benchmarks]


def user_text(row: dict[str, Any]) -> str:
    """Its only user turn."""
    [text] = [message["content"] for message in row["messages"] if message["role"] == "user"]
    return str(text)


def write_rows(path: Path, rows: Iterable[dict[str, Any]], max_characters: float = float("inf")) -> None:
    """As the data set stage writes them."""
    from smoltulu.tasks.data.rows import turns_of
    from smoltulu.tasks.data.rows_writer import RowsWriter

    size = 0
    with RowsWriter(path, "sft") as writer:
        for number, row in enumerate(rows):
            writer.write({"id": f"0:{number}", **row})
            size += sum(len(message["content"]) for message in turns_of(row))
            if size >= max_characters:
                return


def uncompressed_bytes(path: Path) -> int:
    """Of a rows file: nearly all of it is text."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    return sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))


def one_turn(text: str) -> dict[str, Any]:
    """A row of this user turn and an answer."""
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]}


def prepare(folder: str, copies: int) -> dict[str, Any]:
    """Write the inputs: all rows `copies` times, a sample for the peers, and the adversarial ones."""
    rows = list(real_rows())
    texts = [user_text(row) for row in rows]
    benchmarks = load_benchmarks()
    queries = [[" ".join(query) for query in benchmark.queries if query is not None] for benchmark in benchmarks]
    write_rows(Path(folder, "normal.parquet"), (row for _ in range(copies) for row in rows))
    sample = {"texts": texts[::PEER_STEP], "benchmarks": queries}
    Path(folder, "peers.json").write_text(json.dumps(sample), encoding="utf-8")

    # The hottest phrases: the instance that occurs most often, and the window of eight words that most instances hold.
    everything = [query for of_benchmark in queries for query in of_benchmark if query.strip()]
    [(hot_instance, num_equal)] = Counter(everything).most_common(1)
    windows: Counter[str] = Counter()
    for query in everything:
        words = query.split()
        windows.update(sorted({" ".join(words[first : first + 8]) for first in range(len(words) - 7)}))
    [(hot_window, num_sharing)] = windows.most_common(1)
    for name, hot in (("instance", hot_instance), ("8-gram", hot_window)):
        write_rows(Path(folder, f"one hot {name} in every row.parquet"), (one_turn(f"{text}\n{hot}") for text in texts))
    long_text = "\n".join(texts)
    long_text = (long_text * 2)[: int(50 * MB)]
    write_rows(Path(folder, "a single row of 50 MB.parquet"), iter([one_turn(long_text)]))
    for name, piece in ODD_TEXTS.items():
        text = piece * (10_000 // len(piece.encode()))
        write_rows(Path(folder, f"{name}.parquet"), (one_turn(text) for _ in range(1_000)))
    write_rows(Path(folder, "a million empty rows.parquet"), (one_turn("") for _ in range(1_000_000)))
    return {
        "num_rows": len(rows),
        "text_mb": sum(len(text.encode()) for text in texts) / MB,
        "sample_mb": sum(len(text.encode()) for text in sample["texts"]) / MB,
        "num_instances": sum(map(len, queries)),
        "hottest": f"{hot_instance!r} ({num_equal} equal instances), {hot_window!r} (in {num_sharing} instances)",
    }


def prepare_large(folder: str, size: float) -> dict[str, Any]:
    """Write a file of so many characters of text from the real rows, over and over."""
    rows = list(real_rows())
    write_rows(Path(folder, "large.parquet"), (row for _ in range(1_000) for row in rows), size)
    return {}


#: Texts of which every byte may be slow, over and over.
ODD_TEXTS = {
    "only separators": ' ,.?!:;()"-\n\\*_',
    "only accents that stand by themselves": "\u0301\u0300\u0345\u064b",
    "entities within entities": "&amp;amp;lt;b&amp;gt; &#38;#38;#38;lt; &nosuchname;",
    "backslashes and long escapes": "\\\\\\\\n\\u005cu005cu0041 \\ud83d\\ud83d \\U0001F600 \\nnnnnnnn %25%32%35",
    "zero-width characters and broken words": "wo\u200brd bro-\n> ken \u00ad\n1 a\n2 b\n",
    "unfinished tags and links": "<b a='x <p class=x y [a](http://x <b <a href=\"[b](/",
}


# Ours.


def index(folder: str, mode: str, only: str | None = None) -> dict[str, Any]:
    """Read the benchmark files and build the index, imports included. `only`: an index of this one text instead."""
    started = time.perf_counter()
    from smoltulu.tasks.contamination.build import build_index
    from smoltulu.tasks.contamination.index import LoadedBenchmark

    benchmarks = [LoadedBenchmark("only", [(only,)])] if only else load_benchmarks()
    outputs = build_index(Path(folder), benchmarks, mode)
    return {
        "wall": time.perf_counter() - started,
        "cpu": time.process_time(),
        "rss_mb": peak_rss_mb(),
        "num_phrases": outputs.num_phrases,
    }


def scan_one(arguments: tuple[str, Any, str]) -> tuple[Any, int, float, float]:
    """One shard, in this process: its result, the process, its peak memory, seconds of CPU."""
    from smoltulu.tasks.contamination.scan import scan_shard

    index_folder, shard, folder = arguments
    used = time.process_time()
    result = scan_shard(Path(index_folder), shard, Path(folder))
    return result, os.getpid(), peak_rss_mb(), time.process_time() - used


def scan(
    index_folder: str, path: str, processes: int, repeats: int, folder: str, keep_rows: bool = False
) -> dict[str, Any]:
    """From the file to the merged hits, `repeats` times; `processes` 1 stays in this process, on one core.

    Each process scans a little before the clock runs; `start_up` says what that takes. `keep_rows`: the rows without a
    hit are written too, which `kept_cpu` says in seconds of CPU.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from smoltulu.tasks.contamination.merge import merge, write_kept
    from smoltulu.tasks.contamination.rows import plan_shards
    from smoltulu.tasks.contamination.scan import ShortRule

    file = Path(path)
    shard_bytes = min(64 << 20, uncompressed_bytes(file) // (4 * processes) + 1)
    if processes == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    warm_up = Path(tempfile.mkdtemp(dir=folder))
    write_rows(warm_up / "rows.parquet", (one_turn(f"warm up {number}") for number in range(64)))
    wall, cpu, kept_cpu, peak_by_shard = [], [], [], []
    peaks: dict[int, float] = {}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        run = map if processes == 1 else pool.map
        started = time.perf_counter()
        [shard] = plan_shards(warm_up / "rows.parquet")
        few = [shard.model_copy(update={"number": number}) for number in range(4 * processes)]
        list(run(scan_one, [(index_folder, shard, str(warm_up)) for shard in few]))
        start_up = time.perf_counter() - started
        for _ in range(repeats):
            out = Path(tempfile.mkdtemp(dir=folder))
            started = time.perf_counter()
            results, seconds = [], 0.0
            jobs = [(index_folder, shard, str(out)) for shard in plan_shards(file, shard_bytes=shard_bytes)]
            for result, process, peak, used in run(scan_one, jobs):
                results.append(result)
                seconds += used
                peaks[process] = peak
                peak_by_shard.append(sum(peaks.values()))
            used = time.process_time()
            merged = merge(Path(index_folder), results, out)
            cpu.append(seconds + time.process_time() - used)
            wall.append(time.perf_counter() - started)
            if keep_rows:
                used = time.process_time()
                write_kept(file, out / "hits.parquet", out / "kept.parquet", out / "removed.jsonl", ShortRule())
                kept_cpu.append(time.process_time() - used)
            shutil.rmtree(out)
    peaks[os.getpid()] = peak_rss_mb()
    return {
        "wall": wall,
        "cpu": cpu,
        "kept_cpu": kept_cpu,
        "start_up": start_up,
        "rss_mb": sum(peaks.values()),
        "peak_by_shard": peak_by_shard,
        "text_mb": merged.num_bytes / MB,
        "file_mb": uncompressed_bytes(file) / MB,
        "num_hits": merged.num_hits,
        "gsm8k": sum(report.num_contaminated for report in merged.benchmarks if report.name == "gsm8k"),
    }


def in_memory(index_folder: str, path: str, repeats: int) -> dict[str, Any]:
    """The peers' texts, in memory as they have them, and what that takes without the start-up: seconds of CPU."""
    from smoltulu.tasks.contamination.scan import load_index, scan_texts

    texts = json.loads(Path(path).read_text(encoding="utf-8"))["texts"]
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    index = load_index(Path(index_folder))
    scan_texts(index, texts)
    times: list[list[float]] = []
    for given in (texts[:16], texts):
        times.append([])
        for _ in range(4 * repeats):
            started = time.process_time()
            scan_texts(index, given)
            times[-1].append(time.process_time() - started)
    return {"cpu": statistics.median(times[1]) - statistics.median(times[0])}


def encodings(folder: str, repeats: int) -> dict[str, Any]:
    """The same rows as JSON lines and as the rows file: sizes, seconds of CPU to write and to read them."""
    from smoltulu.tasks.contamination.rows import plan_shards, read_blocks
    from smoltulu.tasks.data.rows import stored_rows

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = list(real_rows())
    lines, file = Path(folder, "rows.jsonl"), Path(folder, "rows.parquet")

    def write_lines() -> None:
        with lines.open("w", encoding="utf-8") as stream:
            for number, row in enumerate(rows):
                stream.write(json.dumps({"id": f"0:{number}", **row}, ensure_ascii=False) + "\n")

    def read_lines() -> Iterator[dict[str, Any]]:
        with lines.open(encoding="utf-8") as stream:
            yield from map(json.loads, stream)

    steps: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "write": (write_lines, lambda: write_rows(file, rows)),
        "read as Python rows": (lambda: sum(1 for _ in read_lines()), lambda: sum(1 for _ in stored_rows(file))),
        "read the user turns": (
            lambda: [user_text(row).encode() for row in read_lines()],
            lambda: sum(block.num_rows for shard in plan_shards(file) for block in read_blocks(shard, ("user",))),
        ),
    }
    cpu: dict[str, list[float]] = {}
    for name, both in steps.items():
        times: list[list[float]] = [[], []]
        for turn in range(2 * repeats):  # by turns, so that other load meets both
            started = time.process_time()
            both[turn % 2]()
            times[turn % 2].append(time.process_time() - started)
        cpu[name] = [min(each) for each in times]
    return {"cpu": cpu, "mb": [path.stat().st_size / MB for path in (lines, file)]}


def byte_limit(repeats: int) -> dict[str, Any]:
    """One core, user text in memory: only sum the bytes; only lower-case and hash them, term by term."""
    import numba
    import numpy as np

    @numba.njit
    def add(text):  # type: ignore[no-untyped-def]
        total = np.uint64(0)
        for byte in text:
            total += np.uint64(byte)
        return total

    @numba.njit
    def lower_and_hash(text, lower):  # type: ignore[no-untyped-def]
        total, h = np.uint64(0), np.uint64(0)
        for byte in text:
            c = lower[byte]
            if c == 32:
                total ^= h
                h = np.uint64(0)
            else:
                h = (h ^ np.uint64(c)) * np.uint64(0x100000001B3)
        return total

    table = np.arange(256, dtype=np.uint8)
    table[65:91] += 32
    for separator in b' ,.?!:;()"-\n\\':
        table[separator] = 32
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    text = np.frombuffer("\n".join(user_text(row) for row in real_rows()).encode() * 4, np.uint8)
    add(text[:100]), lower_and_hash(text[:100], table)
    best = {}
    for name, kernel in (("add", lambda: add(text)), ("hash", lambda: lower_and_hash(text, table))):
        times = []
        for _ in range(repeats):
            started = time.process_time()
            kernel()
            times.append(time.process_time() - started)
        best[name] = len(text) / MB / min(times)
    return best


def profile(index_folder: str, path: str, folder: str) -> dict[str, Any]:
    """Own time of the Python functions of a scan on one core; a compiled kernel counts for its caller."""
    import cProfile
    import pstats

    from smoltulu.tasks.contamination.merge import merge
    from smoltulu.tasks.contamination.rows import plan_shards

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    shards = plan_shards(Path(path))
    profiler = cProfile.Profile()
    for number in range(2):  # the first one loads the kernels
        out = Path(tempfile.mkdtemp(dir=folder))
        if number:
            profiler.enable()
        merge(Path(index_folder), [scan_one((index_folder, shard, str(out)))[0] for shard in shards], out)
    profiler.disable()
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    own = sorted(((times[2], f"{Path(where[0]).name}:{where[2]}") for where, times in stats.items()), reverse=True)
    total = sum(seconds for seconds, _ in own)
    return {"parts": [(name, seconds / total) for seconds, name in own[:6]]}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
