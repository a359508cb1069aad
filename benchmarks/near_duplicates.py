"""Near-duplicates: which MinHash library, how fast, how much memory, how many are found.

    python benchmarks/near_duplicates.py [--rows 1000000] [--sample 20000]

Input: the training rows of SMOLTULU_REAL_DATA (default ../shared/data). For many rows, texts of their words are drawn:
a real row with a share of its words replaced by other words of the corpus, 5 of 100 rows so little that they are
near-duplicates. One core. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.near_duplicates import (
    NearDuplicateInputs,
    NearDuplicateRules,
    NearDuplicateStageConfig,
    candidate_probability,
)
from smoltulu.tasks.data.rows import RowsWriter
from smoltulu.tasks.near_duplicates.minhash import band_hashes, signatures
from smoltulu.tasks.near_duplicates.shingles import jaccard, plain_words, shingles
from smoltulu.tasks.near_duplicates.stage import find_near_duplicates
from smoltulu.tasks.stage import StageContext

DATA = Path(os.environ.get("SMOLTULU_REAL_DATA", "../shared/data")) / "train"
FILES = (
    "gsm8k_train.jsonl.gz", "math_cot.json.gz", "oasst_octopack.jsonl.gz", "gpteacher_codegen.json.gz",
    "dolly_hhrlhf_small.jsonl.gz", "t0_p3.jsonl.gz",
)  # fmt: skip
BUCKETS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.01)


def texts() -> Iterator[str]:
    """The user's turn of every real row."""
    for name in FILES:
        with gzip.open(DATA / name, "rt", encoding="utf-8") as stream:
            rows = json.load(stream) if name.endswith(".json.gz") else map(json.loads, stream)
            for row in rows:
                first = row.get("question") or row.get("prompt") or row.get("instruction") or ""
                yield f"{first}\n{row.get('input') or ''}".strip()


def datasketch_signatures(sets: list[list[str]], num_perm: int) -> np.ndarray:
    """The other library, by its batch interface."""
    from datasketch import MinHash

    encoded = [[shingle.encode() for shingle in some] for some in sets]
    return np.array([made.hashvalues for made in MinHash.generator(encoded, num_perm=num_perm)], np.uint32)


def libraries(some: list[str]) -> None:
    """Speed and error of both on real rows, and how many pairs of each bucket meet in a band."""
    rules = NearDuplicateRules()
    sets = [shingles(plain_words(text), rules.shingle, rules.shingle_size) for text in some]
    rng = random.Random(1)
    pairs = []
    for text in some:
        words = plain_words(text).split()
        if len(words) >= 10:
            rate = rng.choice((0.01, 0.03, 0.06, 0.1, 0.2))
            other = [rng.choice(words) if rng.random() < rate else word for word in words]
            pairs.append((" ".join(words), " ".join(other)))
    both = [[shingles(text, rules.shingle, rules.shingle_size) for text in side] for side in zip(*pairs, strict=True)]
    exact = np.array([jaccard(set(a), set(b)) for a, b in zip(*both, strict=True)])
    num_bands, rows_per_band = rules.bands()
    print(
        f"\n{len(some):,} real rows, {np.mean([len(one) for one in sets]):.0f} shingles a row; {len(pairs):,} pairs\n"
    )
    heads = [f"{low:g} to {high:g}" for low, high in pairwise(BUCKETS)]
    print(f"| library | µs a row | mean error | its spread | {' | '.join(heads)} |")
    print("|---|---:|---:|---:|" + "---:|" * (len(BUCKETS) - 1))
    for name, sign in (("rensa", signatures), ("datasketch", datasketch_signatures)):
        started = time.process_time()
        for first in range(0, len(sets), 2048):
            sign(sets[first : first + 2048], rules.num_perm)
        seconds = time.process_time() - started
        left, right = (sign(side, rules.num_perm) for side in both)
        errors = (left == right).mean(axis=1) - exact
        meet = (band_hashes(left, num_bands, rows_per_band) == band_hashes(right, num_bands, rows_per_band)).any(axis=1)
        found = []
        for low, high in pairwise(BUCKETS):
            inside = (exact >= low) & (exact < high)
            found.append(f"{100 * meet[inside].mean():.1f} % of {inside.sum():,}" if inside.any() else "–")
        figures = f"{1e6 * seconds / len(sets):.1f} | {errors.mean():+.4f} | {errors.std():.4f}"
        print(f"| {name} | {figures} | {' | '.join(found)} |")
    theory = [f"{100 * candidate_probability(edge, num_bands, rows_per_band):.1f} %" for edge in BUCKETS[:-1]]
    print(f"\nBy theory at the lower end of each bucket: {', '.join(theory)}")


def simulated(num_rows: int) -> Iterator[str]:
    """Real rows, then real rows with words replaced; 1 in 20 of them hardly."""
    real = list(texts())
    yield from real[:num_rows]
    rng = random.Random(2)
    split = [text.split(" ") for text in real]
    vocabulary = sorted({word for words in split for word in words})
    for _ in range(max(0, num_rows - len(real))):
        rate = 0.01 if rng.random() < 0.05 else rng.uniform(0.2, 1)
        yield " ".join(rng.choice(vocabulary) if rng.random() < rate else word for word in rng.choice(split))


def peak_mb() -> float:
    """Peak memory of this process (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measured(file: Path, folder: Path, rules: dict[str, Any], queue: Any) -> None:
    """Run the stage in this process, and say what it took."""
    before = peak_mb()
    for name in ("out", "work"):
        (folder / name).mkdir(exist_ok=True)
    context = StageContext(folder / "out", folder / "work", ComputeSettings(num_threads=1), lambda *_, **__: None)
    wall, cpu = time.monotonic(), time.process_time()
    outputs, _ = find_near_duplicates(
        NearDuplicateStageConfig(kind="sft", settings=NearDuplicateRules(**rules)),
        NearDuplicateInputs(dataset=str(file)),
        context,
    )
    queue.put((time.monotonic() - wall, time.process_time() - cpu, before, peak_mb(), outputs))


def crowded(num_rows: int) -> Iterator[str]:
    """The worst case: all rows share a template of 40 words, and none is a near-duplicate (Jaccard about 0.66)."""
    rng = random.Random(4)
    template = " ".join(f"template{number}" for number in range(40))
    for _ in range(num_rows):
        yield f"{template} {' '.join(str(rng.random()) for _ in range(4))}"


def stage(num_rows: int, rules: dict[str, Any], made: Callable[[int], Iterator[str]] = simulated) -> None:
    """Time and memory of the whole stage."""
    with tempfile.TemporaryDirectory() as name:
        folder, num_characters = Path(name), 0
        with RowsWriter(folder / "rows.parquet", "sft") as writer:
            for number, text in enumerate(made(num_rows)):
                num_characters += len(text)
                turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
                writer.write({"id": f"0:{number}", "messages": turns})
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=measured, args=(folder / "rows.parquet", folder, rules, queue))
        process.start()
        wall, cpu, before, peak, outputs = queue.get()
        process.join()
    size = f"{num_rows:,} rows of {num_characters / num_rows:.0f} characters"
    print(
        f"\n{size}, {made.__name__}, {rules or 'default rules'}: {wall:.0f} s, {cpu:.0f} s of CPU; memory {peak:.0f} MB, "
        f"{before:.0f} MB of it before the first row; {outputs.num_near_duplicates:,} near-duplicates "
        f"({outputs.num_clusters:,} clusters), {outputs.num_unfinished:,} rows unfinished",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sample", type=int, default=20_000)
    parser.add_argument("--paraphrases", action="store_true")
    given = parser.parse_args()
    if given.paraphrases:
        paraphrase_quality()
        return
    real = list(texts())
    if given.sample:
        libraries(random.Random(0).sample(real, min(given.sample, len(real))))
    if given.rows:
        stage(min(len(real), given.rows), {})
        stage(given.rows, {})
        stage(min(given.rows, 100_000), {"shingle": "characters", "shingle_size": 8})
        stage(min(given.rows, 50_000), {}, crowded)


if __name__ == "__main__":
    main()
