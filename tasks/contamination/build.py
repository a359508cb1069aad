"""Making a contamination index: the phrases of all benchmarks, and the tables that find them in a turn.

Full mode: a phrase is a field. n-gram mode: a phrase is the text of a window of n spaCy tokens; a span text that
repeats in a field keeps only its last position, as in the reference.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smoltulu.schemas.contamination import BenchmarkIndexOutputs, IndexedBenchmark
from smoltulu.tasks.contamination.kernels.build import (
    fill_filter,
    fill_slots,
    normalise_all,
    run_hashes,
    window_phrases,
)
from smoltulu.tasks.contamination.kernels.layout import (
    ANCHOR_TERMS,
    FILTER_HEAD,
    HEAD_TERMS,
    NUM_FILTERS,
    FullPostings,
    NgramPostings,
    Phrases,
)
from smoltulu.tasks.contamination.kernels.normal import normalise_fields
from smoltulu.tasks.contamination.kernels.text import LOWER_BYTES, LOWER_CODE_POINTS
from smoltulu.tasks.contamination.normal_form import normal_tables
from smoltulu.tasks.contamination.queries import LoadedBenchmark, Query

#: text -> (first, last) character of each token: an integer array of two columns.
Tokenizer = Callable[[str], np.ndarray]

#: n-gram mode: instances that can score no more are too short for it.
_SHORT_SCORE = 0.5
_BITS_PER_KEY = 16  # of a filter: at most one key in 60 that is not in it passes


def build_index(
    folder: Path,
    benchmarks: Sequence[LoadedBenchmark],
    mode: str,
    ngram_size: int | None = None,
    tokenize: Tokenizer | None = None,
    short_items: bool = False,
) -> BenchmarkIndexOutputs:
    """Write the index of all benchmarks into `folder`.

    Args:
        folder: exists and is empty.
        benchmarks: with their queries; those not checked have none.
        mode: full, normalised or ngram.
        ngram_size: tokens of a window in n-gram mode; None: 8.
        tokenize: the tokenizer of n-gram mode; None: spaCy's.
        short_items: n-gram mode: instances that no text can bring above 0.5 are looked for as in full mode.

    Raises:
        ValueError: n-gram mode without spaCy.
    """
    ngram_size = (ngram_size or 8) if mode == "ngram" else None
    queries: list[Query] = []
    places: list[tuple[int, int]] = []
    for number, benchmark in enumerate(benchmarks):
        for row, query in enumerate(benchmark.queries):
            if query is not None:
                queries.append(tuple(_whole(field) for field in query))
                places.append((number, row))
    numbers: dict[str, int] = {}
    parts = [[numbers.setdefault(field, len(numbers)) for field in query] for query in queries]
    source, source_offsets = joined([field.encode() for field in numbers])
    tables = normal_tables() if mode == "normalised" else None
    if tables is not None:
        terms, term_offsets, num_terms = normalise_fields(source, source_offsets, tables)
    else:
        terms, term_offsets, num_terms = normalise_all(source, source_offsets, LOWER_BYTES, LOWER_CODE_POINTS)

    if mode != "ngram":
        phrases, arrays, best_possible = _full(terms, term_offsets, num_terms, parts)
    else:
        assert ngram_size is not None
        tokenize = tokenize or spacy_tokenizer()
        whole = (terms, term_offsets, num_terms) if short_items else None
        phrases, arrays, best_possible = _ngram(
            list(numbers), source, source_offsets, parts, ngram_size, tokenize, whole
        )
    arrays = {f"phrases_{name}": array for name, array in phrases._asdict().items()} | arrays
    if tables is not None:
        arrays |= {f"normal_{name}": array for name, array in tables._asdict().items()}
    arrays["num_terms"] = np.array([sum(int(num_terms[field]) for field in part) for part in parts], dtype=np.int32)
    arrays["best_possible"] = best_possible
    arrays["benchmark"] = np.array([number for number, _ in places], dtype=np.int32)
    arrays["benchmark_row"] = np.array([row for _, row in places], dtype=np.int32)

    indexed = tuple(
        IndexedBenchmark(
            name=benchmark.name,
            num_instances=sum(query is not None for query in benchmark.queries),
            num_skipped=sum(query is None for query in benchmark.queries),
            not_checked=benchmark.not_checked,
        )
        for benchmark in benchmarks
    )
    outputs = BenchmarkIndexOutputs(
        mode=mode,
        ngram_size=ngram_size,
        num_instances=len(queries),
        num_phrases=len(phrases.place),
        benchmarks=indexed,
        short_items=short_items,
    )
    _write(folder, arrays, queries, places, outputs)
    return outputs


def spacy_tokenizer() -> Tokenizer:
    """Token bounds by spaCy's English tokenizer, which needs no model. ValueError where spaCy is not installed."""
    try:
        import spacy
    except ImportError as error:
        raise ValueError(
            "contamination mode 'ngram' needs spaCy's tokenizer, which is not installed: run "
            "`pip install 'spacy>=3.8,<4'`, or set contamination.mode to 'full'"
        ) from error
    from spacy.attrs import IDX, LENGTH

    language = spacy.blank("en")
    language.max_length = 1 << 40  # the limit guards parsers, which are not run here

    def tokenize(text: str) -> np.ndarray:
        bounds = language.make_doc(text).to_array([IDX, LENGTH]).astype(np.int64).reshape(-1, 2)
        bounds[:, 1] += bounds[:, 0]
        return bounds

    return tokenize


def _full(
    terms: np.ndarray, offsets: np.ndarray, num_terms: np.ndarray, parts: list[list[int]]
) -> tuple[Phrases, dict[str, np.ndarray], np.ndarray]:
    texts, postings, best_possible = _whole_fields(terms, offsets, num_terms, parts)
    return _tables(*joined(texts)), {f"full_{name}": array for name, array in postings._asdict().items()}, best_possible


def _whole_fields(
    terms: np.ndarray, offsets: np.ndarray, num_terms: np.ndarray, parts: list[list[int]], first: int = 0
) -> tuple[list[bytes], FullPostings, np.ndarray]:
    """Distinct fields of the instances as phrases from number `first` on, their postings, the best possible scores."""
    whole = terms.tobytes()
    numbers: dict[bytes, int] = {}
    length: list[int] = []

    def phrase(field: int) -> int:
        text = whole[offsets[field] : offsets[field + 1]]
        if text and text not in numbers:
            length.append(int(num_terms[field]))
        return numbers.setdefault(text, len(numbers)) if text else -1  # -1: no terms

    instances = [[phrase(field) for field in part] for part in parts]
    frequency = Counter(phrase for instance in instances for phrase in set(instance))
    # Start from the rarest field, then the longest: hot one-word fields (PopQA's "occupation") then cost nothing.
    leader = [
        -1
        if not instance or -1 in instance
        else min(instance, key=lambda phrase: (frequency[phrase], -length[phrase], phrase))
        for instance in instances
    ]
    lead_offsets, lead_instance = _group(np.array(leader, dtype=np.int32), len(numbers))
    distinct = [[] if -1 in instance else list(dict.fromkeys(instance)) for instance in instances]
    part_offsets = _offsets([len(instance) for instance in distinct])
    part_phrase = np.array([phrase for instance in distinct for phrase in instance], dtype=np.int32)
    lead_offsets = np.concatenate([np.zeros(first, np.int32), lead_offsets])
    best_possible = np.array([0.0 if not instance or -1 in instance else 1.0 for instance in instances])
    return (
        list(numbers),
        FullPostings(lead_offsets, lead_instance, part_offsets, part_phrase + np.int32(first)),
        best_possible,
    )


def _ngram(
    fields: list[str],
    source: np.ndarray,
    source_offsets: np.ndarray,
    parts: list[list[int]],
    n: int,
    tokenize: Tokenizer,
    whole: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
) -> tuple[Phrases, dict[str, np.ndarray], np.ndarray]:
    tokens = [_in_bytes(field, np.asarray(tokenize(field), dtype=np.int64).reshape(-1, 2)) for field in fields]
    num_tokens = np.array([len(bounds) for bounds in tokens], dtype=np.int32)
    bounds = np.concatenate([*tokens, np.empty((0, 2), np.int64)])
    bounds += np.repeat(source_offsets[:-1], num_tokens)[:, None]
    text, text_offsets, window_field, window_start, window_phrase = window_phrases(
        source, bounds, num_tokens, n, LOWER_BYTES, LOWER_CODE_POINTS
    )
    field_offsets = _offsets(np.bincount(window_field, minlength=len(fields)))
    # The best that any text can do is to hold every window.
    coverable = []
    for field in range(len(fields)):
        starts = window_start[field_offsets[field] : field_offsets[field + 1]]
        covered = n + int(np.minimum(np.diff(starts), n).sum()) if len(starts) else 0
        coverable.append(covered / int(num_tokens[field]) if covered else 0.0)
    best_possible = np.array([sum(coverable[field] for field in part) / len(part) for part in parts])
    arrays = {}
    if whole is not None:
        short = [part if best <= _SHORT_SCORE else [] for part, best in zip(parts, best_possible, strict=True)]
        texts, full, found_whole = _whole_fields(*whole, short, len(text_offsets) - 1)
        more, more_offsets = joined(texts)
        text = np.concatenate([text, more])
        text_offsets = np.concatenate([text_offsets, text_offsets[-1] + more_offsets[1:]])
        best_possible = np.maximum(best_possible, found_whole)
        arrays = {f"full_{name}": array for name, array in full._asdict().items()}
        arrays["is_short"] = found_whole > 0
    window_offsets, by_phrase = _group(window_phrase, len(text_offsets) - 1)
    users = [(field, instance) for instance, part in enumerate(parts) for field in dict.fromkeys(part)]
    user_offsets, by_field = _group(np.array([field for field, _ in users], dtype=np.int32), len(fields))
    postings = NgramPostings(
        window_offsets=window_offsets,
        window_field=window_field[by_phrase],
        field_offsets=field_offsets,
        field_start=window_start,
        field_phrase=window_phrase,
        field_tokens=num_tokens,
        user_offsets=user_offsets,
        user_instance=np.array([instance for _, instance in users], dtype=np.int32)[by_field],
        part_offsets=_offsets([len(part) for part in parts]),
        part_field=np.array([field for part in parts for field in part], dtype=np.int32),
    )
    arrays |= {f"ngram_{name}": array for name, array in postings._asdict().items()}
    return _tables(text, text_offsets), arrays, best_possible


def _tables(text: np.ndarray, offsets: np.ndarray) -> Phrases:
    """Anchors and filters. The anchor of a long phrase is its run of 8 terms that the fewest phrases share."""
    run_offsets, keys, heads, num_terms, first_byte = run_hashes(text, offsets)
    _, same, counts = np.unique(keys, return_inverse=True, return_counts=True)
    shared = counts[same]
    rarest = np.lexsort((shared, np.repeat(np.arange(len(offsets) - 1), np.diff(run_offsets))))
    chosen = rarest[run_offsets[:-1]] if len(keys) else np.empty(0, np.int64)
    keys, heads, num_terms, first_byte = (array[chosen] for array in (keys, heads, num_terms, first_byte))

    wanted = [keys[num_terms == length] for length in range(1, ANCHOR_TERMS + 1)]
    of_filter = {length + 1: array for length, array in enumerate(wanted)}
    of_filter[FILTER_HEAD] = heads[num_terms >= HEAD_TERMS]
    distinct = [np.unique(of_filter.get(which, keys[:0])) for which in range(NUM_FILTERS)]
    num_words = [1 << max(0, (len(array) * _BITS_PER_KEY // 64).bit_length()) for array in distinct]
    filter_first = np.cumsum([0, *num_words])
    filter_words = np.zeros(filter_first[-1], dtype=np.uint64)
    filter_mask = np.array(num_words, dtype=np.uint64) - np.uint64(1)
    for which, array in enumerate(distinct):
        fill_filter(filter_words, filter_first[which], filter_mask[which], array)
    return Phrases(
        text=text,
        place=np.stack([offsets[:-1], np.diff(offsets), first_byte], axis=1),
        filter_words=filter_words,
        filter_first=filter_first[:-1].astype(np.int64),
        filter_mask=filter_mask,
        slots=fill_slots(keys, 1 << (3 * len(keys) // 2 + 1).bit_length()),
    )


def _write(
    folder: Path,
    arrays: dict[str, np.ndarray],
    queries: list[Query],
    places: list[tuple[int, int]],
    outputs: BenchmarkIndexOutputs,
) -> None:
    digest = hashlib.blake2b(digest_size=32)
    for name, array in sorted(arrays.items()):
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
        digest.update(f"{name}\0{array.dtype.str}{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).data)
    table = pa.table(
        {
            "instance": pa.array(range(len(queries)), pa.int32()),
            "benchmark": pa.array([outputs.benchmarks[number].name for number, _ in places], pa.string()),
            "row": pa.array([row for _, row in places], pa.int32()),
            "fields": pa.array([list(query) for query in queries], pa.list_(pa.string())),
            "num_terms": pa.array(arrays["num_terms"], pa.int32()),
        }
    )
    pq.write_table(table, folder / "queries.parquet", compression="zstd")
    # Written last: a folder without it is no index.
    header = {**outputs.model_dump(mode="json"), "digest": digest.hexdigest()}
    (folder / "index.json").write_text(json.dumps(header, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _whole(text: str) -> str:
    """Half a surrogate pair, which JSON may hold and UTF-8 may not, becomes U+FFFD as in Java."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _in_bytes(text: str, bounds: np.ndarray) -> np.ndarray:
    """Character positions as positions in the UTF-8 bytes."""
    if text.isascii():
        return bounds
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    size = 1 + (points >= 0x80) + (points >= 0x800).astype(np.int64) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(size)])[bounds]


def joined(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The texts end to end, and where each begins; behind them their end."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return np.frombuffer(bytearray(b"".join(texts)), dtype=np.uint8), offsets


def _offsets(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _group(keys: np.ndarray, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """(offsets of each key, positions by key); negative keys are left out."""
    order = np.argsort(keys, kind="stable").astype(np.int32)
    num_left_out = int((keys < 0).sum())
    return _offsets(np.bincount(keys[keys >= 0], minlength=num_keys)), order[num_left_out:]
