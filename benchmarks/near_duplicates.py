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
from smoltulu.tasks.data.rows_writer import RowsWriter
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
        f"\n{size}, {made.__name__}, {rules or 'default rules'}: {wall:.0f} s, {cpu:.0f} s of CPU, {peak:.0f} MB, "
        f"{before:.0f} of it before the first row; {outputs.num_near_duplicates:,} near-duplicates "
        f"({outputs.num_clusters:,} clusters), {outputs.num_unfinished:,} rows unfinished",
        flush=True,
    )


#: Words and phrases that mean the same, for questions reworded by rule.
SAME = (
    ("how many", "what number of"), ("how much", "what amount of"), ("bought", "purchased"), ("buys", "purchases"),
    ("each", "every"), ("has", "owns"), ("gave", "handed"), ("gives", "hands"), ("more", "additional"),
    ("total", "overall sum"),
    ("makes", "produces"), ("wants", "would like"), ("needs", "requires"), ("friend", "pal"), ("house", "home"),
    ("store", "shop"), ("money", "cash"), ("costs", "is priced at"), ("half", "one half"), ("twice", "two times"),
    ("also", "in addition"), ("gets", "receives"), ("got", "received"), ("children", "kids"), ("week", "seven days"),
    ("if", "supposing"), ("then", "afterwards"), ("spends", "uses up"), ("earns", "makes"), ("left", "remaining"),
)  # fmt: skip


def reworded(question: str, rng: random.Random) -> str:
    """A question in other words: names changed, sentences before the last shuffled, synonyms."""
    names = sorted(set(re.findall(r"(?<=[.!?] )[A-Z][a-z]+|^[A-Z][a-z]+|(?<=[a-z,] )[A-Z][a-z]+", question)))
    for name in names:
        if name not in ("How", "If", "The", "In", "What", "A", "He", "She", "They", "After", "It", "On", "There", "At"):
            question = re.sub(
                rf"\b{name}\b", rng.choice(("Zora", "Quinn", "Idris", "Maeve", "Tomas", "Yuki")), question
            )
    for plain, other in SAME:
        question = re.sub(rf"\b{plain}\b", other, question, flags=re.IGNORECASE)
    sentences = re.split(r"(?<=[.?!]) ", question)
    first = sentences[:-1]
    rng.shuffle(first)
    return " ".join([*first, sentences[-1]])


def paraphrase_quality() -> None:
    """GSM8K's test questions reworded by rule are to be found; questions of its training set are not."""
    from smoltulu.tasks.near_duplicates.paraphrases import embed, most_alike, numbers_of

    def read(name: str, column: str) -> list[str]:
        with gzip.open(DATA.parent / name, "rt", encoding="utf-8") as stream:
            rows = json.load(stream) if name.endswith(".json.gz") else list(map(json.loads, stream))
            return [row[column] for row in rows]

    rng = random.Random(3)
    test = read("eval/gsm8k_test.jsonl.gz", "question")
    copies = [reworded(text, rng) for text in test]
    clean = {
        "gsm8k train": read("train/gsm8k_train.jsonl.gz", "question"),
        "dolly": read("train/dolly_hhrlhf_small.jsonl.gz", "prompt"),
    }
    alike = [
        jaccard(set(shingles(plain_words(a), "words", 3)), set(shingles(plain_words(b), "words", 3)))
        for a, b in zip(test, copies, strict=True)
    ]
    print(
        f"\n{len(test):,} questions reworded; Jaccard of 3 words with the original {np.mean(alike):.2f} on average, "
        f"{100 * np.mean(np.array(alike) >= 0.8):.1f} % of them near-duplicates at 0.8\n"
    )
    print(f"e.g. {test[0]}\n  -> {copies[0]}\n")
    others = embed(test).astype(np.float16)
    started = time.process_time()
    vectors = {"reworded": embed(copies), **{name: embed(some) for name, some in clean.items()}}
    seconds = time.process_time() - started
    print(f"{sum(map(len, vectors.values())) / seconds:,.0f} texts/s\n")
    print("| cosine | reworded: its original | same numbers | gsm8k train | same numbers | dolly | same numbers |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    numbers = [numbers_of(text) for text in test]
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95):
        cells = []
        for name, some in {"reworded": copies, **clean}.items():
            found = list(most_alike(vectors[name], others, threshold))
            if name == "reworded":
                found = [one for one in found if one.number == one.other]
            same = sum(numbers_of(some[one.number]) == numbers[one.other] for one in found)
            cells += [f"{100 * len(found) / len(some):.1f} %", f"{100 * same / len(some):.2f} %"]
        print(f"| {threshold:g} | {' | '.join(cells)} |")
    with gzip.open(DATA / "math_cot.json.gz", "rt", encoding="utf-8") as stream:
        math = [f"{row['instruction']}\n{row['input']}".strip() for row in json.load(stream)]
    exact = {plain_words(text) for text in test}
    for threshold in (0.8, 0.9, 0.95):
        found = list(most_alike(embed(math), others, threshold))
        words = sum(plain_words(math[one.number]) in exact for one in found)
        same = [one for one in found if numbers_of(math[one.number]) == numbers[one.other]]
        print(
            f"\nmath_cot at {threshold:g}: {len(found):,} of {len(math):,} told, {len(same):,} with the same numbers, "
            f"{len({one.other for one in same}):,} test questions; {words:,} rows have the very same words"
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
