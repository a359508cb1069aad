"""What other projects do against contamination, timed: a child of benchmarks/contamination.py, one peer a process.

    python benchmarks/contamination_peers.py PEER INPUT.json REPEATS

INPUT.json holds `texts` (training prompts) and `benchmarks` (lists of texts). Prints one JSON object. Needs nothing but
the standard library and the peer's own package, so that it runs in an environment of its own.

open-r1 and s1 are scripts, not packages; their loops are written here after the published ones, function by function:
open-r1 scripts/decontaminate.py at 1416fa0c (Apache-2.0), s1 data/decontaminate_util.py and data/collect_data.py at
77272c6e (Apache-2.0). Progress bars, printing and uploads are left out. datatrove (Apache-2.0) and lm-eval's Janitor
(MIT) are called as installed.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

NGRAM_SIZE = 8
Timed = Callable[[list[str]], int]  # scans texts; returns how many were flagged


def normalize_string(text: str) -> str:
    """open-r1 and s1."""
    text = text.lower().strip()
    return " ".join(text.split())


def word_ngrams(text: str, n: int) -> list[str]:
    """open-r1 and s1."""
    words = text.split()
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def build_ngram_lookup(documents: list[str], ngram_size: int = NGRAM_SIZE) -> dict[str, set[int]]:
    """open-r1 and s1."""
    lookup = collections.defaultdict(set)
    for doc_id, document in enumerate(documents):
        for ngram in word_ngrams(normalize_string(document), ngram_size):
            lookup[ngram].add(doc_id)
    return lookup


def build_ngram_single(document: str, ngram_size: int = NGRAM_SIZE) -> set[str]:
    """open-r1."""
    return set(word_ngrams(normalize_string(document), ngram_size))


def open_r1_script(benchmarks: list[list[str]]) -> Timed:
    """The script's loop: a `Dataset.map` over all rows for every benchmark (the script uses 8 processes, here 2)."""
    import datasets

    datasets.disable_progress_bars()
    lookups = [build_ngram_lookup(documents) for documents in benchmarks]

    def scan(texts: list[str]) -> int:
        ds = datasets.Dataset.from_dict({"problem": texts})
        for number, ngram_lookup in enumerate(lookups):

            def find_contaminated(
                row: dict[str, Any], lookup: Any = ngram_lookup, number: int = number
            ) -> dict[str, Any]:
                ngrams = build_ngram_single(row["problem"])
                row[f"contaminated_{number}"] = any(set(ngram in lookup for ngram in ngrams))
                return row

            ds = ds.map(find_contaminated, num_proc=2)
        return sum(any(flags) for flags in zip(*(ds[f"contaminated_{i}"] for i in range(len(lookups))), strict=True))

    return scan


def open_r1_one_pass(benchmarks: list[list[str]]) -> Timed:
    """Its functions at their best: no `datasets`, all benchmarks in one look-up, one pass."""
    lookup = build_ngram_lookup([document for documents in benchmarks for document in documents])
    return lambda texts: sum(any(ngram in lookup for ngram in build_ngram_single(text)) for text in texts)


def s1(benchmarks: list[list[str]]) -> Timed:
    """Look-ups of all training and all test n-grams, then the intersection; the training side is what is timed."""
    test_lookup = build_ngram_lookup([document for documents in benchmarks for document in documents])

    def scan(texts: list[str]) -> int:
        train_lookup = build_ngram_lookup(texts)
        contaminated: set[int] = set()
        for ngram, doc_ids in train_lookup.items():
            if ngram in test_lookup:
                contaminated.update(doc_ids)
        return len(contaminated)

    return scan


def datatrove(benchmarks: list[list[str]]) -> Timed:
    """NGramsDecontFilter on hashes made as its indexer makes them (which asks for lighteval, for Hub tasks)."""
    import numpy as np
    from datatrove.data import Document
    from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.utils.text import ngrams, simplify_text

    config = NGramsDecontConfig(n_grams=NGRAM_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        step = NGramsDecontFilter(folder, config=config)
        for number, documents in enumerate(benchmarks):
            hashes = set()
            for document in documents:
                tokens = step.tokenizer.word_tokenize(simplify_text(document, config.norm_config))
                hashes.update(step.hash_func(" ".join(ngram)) for ngram in ngrams(tokens, config.n_grams))
            np.array(list(hashes), dtype=config.hash_config.np_descr).tofile(f"{folder}/{number}.index.hashes")
        step.load_index_hashes()
    return lambda texts: sum(step.filter(Document(text=text, id="")) is not True for text in texts)


def janitor(benchmarks: list[list[str]]) -> Timed:
    """lm-eval's Janitor in Python, n = 13 (its C++ module is not in the package, and never tests membership)."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from lm_eval.decontamination.janitor import Janitor
    cleaner = Janitor()
    for documents in benchmarks:
        for document in documents:
            cleaner.register_contaminant_python(document)
    # It drops clean texts under 200 characters too, so what it removes says little; its work is the same.
    return lambda texts: sum(cleaner.clean_python(text) != [text] for text in texts)


PEERS: dict[str, tuple[str, str | None, bool, Callable[[list[list[str]]], Timed]]] = {
    # name: (what it is, package, whether somebody publishes and uses it so, how)
    "open-r1-script": ("open-r1 script's loop (reimplemented)", "datasets", True, open_r1_script),
    "open-r1-one-pass": ("open-r1's functions in one pass (not how it is published)", None, False, open_r1_one_pass),
    "s1": ("s1's loop (reimplemented)", None, True, s1),
    "datatrove": ("datatrove NGramsDecontFilter, n = 8", "datatrove", True, datatrove),
    "janitor": ("lm-eval Janitor (Python), n = 13", "lm_eval", True, janitor),
}


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Time one peer, in seconds of CPU of all its processes, and print what was measured."""
    _, package, _, peer = PEERS[sys.argv[1]]
    with open(sys.argv[2], encoding="utf-8") as stream:
        given = json.load(stream)
    try:
        version = importlib.metadata.version(package) if package else ""
    except importlib.metadata.PackageNotFoundError:
        print(json.dumps({"skipped": f"{package} is not installed in {sys.prefix}"}))
        return
    started = time.perf_counter()
    scan = peer(given["benchmarks"])
    index_seconds = time.perf_counter() - started
    # What it takes to start, once, whatever the number of rows (open-r1's script pickles its look-ups for processes).
    began = _cpu_seconds()
    scan(given["texts"][:16])
    start_up = _cpu_seconds() - began
    cpu, flagged = [], 0
    for _ in range(int(sys.argv[3])):
        began = _cpu_seconds()
        flagged = scan(given["texts"])
        cpu.append(_cpu_seconds() - began)
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    measured = {
        "version": version,
        "index_seconds": index_seconds,
        "start_up": start_up,
        "cpu": cpu,
        "flagged": flagged,
    }
    # ru_maxrss is in kB on Linux; of several children it is that of the largest.
    print(json.dumps(measured | {"rss_mb": own / 1000, "child_rss_mb": child / 1000}))


if __name__ == "__main__":
    main()
