"""The engine against Lucene, which open-instruct's check asks: every pair of instance and turn, with its score.

The last two tests are the large ones (over 40,000 instances, 50,000 prompts). All skip where Java or the jar is absent.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from smoltulu.flows.recipe import load_recipe
from smoltulu.tasks.contamination.index import LoadedBenchmark, load_benchmark
from smoltulu.tasks.data.formats import MalformedRow, adapt
from smoltulu.tasks.data.sources import read_rows
from tests import ROOT
from tests.rows_file import write_rows
from tests.tasks.contamination import contamination_brute_force as brute_force
from tests.tasks.contamination.contamination_fuzz import conversation, generate
from tests.tasks.contamination.lucene import oracle

pytestmark = pytest.mark.skipif(oracle.why_not() is not None, reason=f"differential oracle: {oracle.why_not()}")
needs_spacy = pytest.mark.skipif(importlib.util.find_spec("spacy") is None, reason="spaCy is not installed")

N, THRESHOLD = 8, 0.5
DATA = Path(os.environ.get("SMOLTULU_REAL_DATA") or ROOT.parent / "shared" / "data")

#: New in Unicode 14, so Python 3.11 knows their lower case and Java 17, with Unicode 13, does not.
NEWER_THAN_JAVA = {0x2C2F, 0xA7C0, 0xA7D0, 0xA7D6, 0xA7D8, *range(0x10570, 0x10596)}


def spacy_tokenizer():
    import spacy

    make_doc = spacy.blank("en").make_doc
    return lambda text: [(token.idx, token.idx + len(token)) for token in make_doc(text)]


def scored(folder, benchmarks, turns, mode):
    """The engine's hits: (instance, turn) -> score."""
    from smoltulu.tasks.contamination.build import build_index
    from smoltulu.tasks.contamination.scan import load_index
    from tests.tasks.contamination.contamination_texts import scan_texts

    folder.mkdir()
    build_index(folder, benchmarks, mode, N)
    hits = scan_texts(load_index(folder), turns, THRESHOLD)
    assert [(hit.turn, hit.instance) for hit in hits] == sorted({(hit.turn, hit.instance) for hit in hits})
    return {(hit.instance, hit.turn): hit.score for hit in hits}


def above(scores):
    return {pair: score for pair, score in scores.items() if score > THRESHOLD}


def generated(seed, num_instances, num_turns):
    """One benchmark of generated instances, those that count (no field is None), and the turns."""
    instances, turns = generate(seed, num_instances, num_turns)
    queries = [None if None in instance else instance for instance in instances]
    return [LoadedBenchmark("generated", queries)], [query for query in queries if query is not None], turns


def test_every_cased_character_is_lower_cased_as_in_java(tmp_path):
    characters = [
        chr(code)
        for code in range(0x110000)
        if not 0xD800 <= code < 0xE000 and code not in NEWER_THAN_JAVA and chr(code).swapcase() != chr(code)
    ]
    assert len(characters) > 2_500 and {"\u0130", "\u03a3", "\u03c2", "\u1e9e"} < set(characters)
    instances = [(character,) for character in characters]
    found = scored(tmp_path / "index", [LoadedBenchmark("characters", instances)], characters, "full")
    assert found == oracle.full_scores(instances, characters)


def test_full_match_on_generated_texts(tmp_path):
    benchmarks, instances, turns = generated(0, 1_200, 1_200)
    expected = oracle.full_scores(instances, turns)
    assert len(expected) > 10_000 and len(instances) < 1_200  # it is a real test: many hits, some instances left out
    assert scored(tmp_path / "index", benchmarks, turns, "full") == expected


@needs_spacy
def test_ngram_match_on_generated_texts(tmp_path):
    benchmarks, instances, turns = generated(1, 600, 600)
    expected = above(oracle.ngram_scores(instances, turns, N, spacy_tokenizer()))
    assert len(expected) > 100
    assert scored(tmp_path / "index", benchmarks, turns, "ngram") == expected


@needs_spacy
def test_best_scores_below_the_threshold_are_those_of_the_rule_too(tmp_path):
    from smoltulu.tasks.contamination.build import build_index
    from smoltulu.tasks.contamination.scan import load_index
    from tests.tasks.contamination.contamination_texts import best_scores

    benchmarks, instances, turns = generated(2, 300, 300)
    expected = [0.0] * len(instances)
    for (instance, _), score in oracle.ngram_scores(instances, turns, N, spacy_tokenizer()).items():
        expected[instance] = max(expected[instance], score)
    assert sum(0 < score <= THRESHOLD for score in expected) > 10
    build_index(tmp_path, benchmarks, "ngram", N)
    assert best_scores(load_index(tmp_path), turns, THRESHOLD).tolist() == expected


@needs_spacy
def test_the_brute_force_rule_is_that_of_lucene():
    _, instances, turns = generated(3, 40, 40)
    tokenize = spacy_tokenizer()
    pairs = [(instance, turn) for instance in range(len(instances)) for turn in range(len(turns))]
    full = {(i, t): brute_force.full_score(instances[i], turns[t]) for i, t in pairs}
    ngram = {(i, t): brute_force.ngram_score(instances[i], turns[t], N, tokenize) for i, t in pairs}
    assert {pair: score for pair, score in full.items() if score} == oracle.full_scores(instances, turns)
    assert {pair: score for pair, score in ngram.items() if score} == oracle.ngram_scores(instances, turns, N, tokenize)


# The large ones.


@pytest.fixture(scope="module")
def real():
    """The twelve benchmarks of `real-small` with generated ones, and the user turns of its training sets likewise."""
    if not DATA.is_dir():
        pytest.skip(f"real data absent: {DATA} (set SMOLTULU_REAL_DATA)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLTULU_REAL_DATA", str(DATA))
        recipe = load_recipe("real-small")
        benchmarks = [load_benchmark(benchmark) for benchmark in recipe.contamination.benchmarks]
        turns = []
        for data in (recipe.data.sft, recipe.data.preference, recipe.contamination.audit):
            for source in data.sources:
                for row in read_rows(source):
                    try:
                        adapted = adapt(row, source)
                    except MalformedRow:
                        continue
                    messages = adapted.get("messages") or adapted["prompt"]
                    turns += [message["content"] for message in messages if message["role"] == "user"]
    fuzz, _, fuzz_turns = generated(4, 10_000, 10_000)
    instances = [query for benchmark in benchmarks for query in benchmark.queries if query is not None]
    assert len(instances) >= 40_000 and len(turns) >= 50_000
    return {"real": (benchmarks, instances, turns), "generated": (fuzz, [q for q in fuzz[0].queries if q], fuzz_turns)}


def scored_by_shards(folder, benchmarks, turns, mode):
    """The same through files: rows of one user turn, cut into shards, merged."""
    import pyarrow.parquet

    from smoltulu.tasks.contamination.build import build_index
    from smoltulu.tasks.contamination.merge import merge
    from smoltulu.tasks.contamination.rows import plan_shards
    from smoltulu.tasks.contamination.scan import scan_shard

    # The answer repeats the turn before: it must not count.
    rows = [conversation(str(number), turn, turns[number - 1]) for number, turn in enumerate(turns)]
    file = write_rows(folder / "rows.parquet", rows, group_rows=500)
    (folder / "index").mkdir()
    build_index(folder / "index", benchmarks, mode, N)
    shards = plan_shards(file, shard_bytes=2 * sum(map(len, turns)) // 7)
    assert len(shards) > 4
    results = [scan_shard(folder / "index", shard, folder / "shards", match_threshold=THRESHOLD) for shard in shards]
    merge(folder / "index", results[::-1], folder, match_threshold=THRESHOLD)
    hits = pyarrow.parquet.read_table(folder / "hits.parquet").to_pydict()
    return dict(zip(zip(hits["instance"], hits["row"], strict=True), hits["score"], strict=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("texts", ["real", "generated"])
def test_full_match_at_full_size(real, tmp_path, texts):
    benchmarks, instances, turns = real[texts]
    expected = oracle.full_scores(instances, turns)
    assert scored(tmp_path / "memory", benchmarks, turns, "full") == expected
    assert scored_by_shards(tmp_path, benchmarks, turns, "full") == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("texts", ["real", "generated"])
@needs_spacy
def test_ngram_match_at_full_size(real, tmp_path, texts):
    benchmarks, instances, turns = real[texts]
    expected = above(oracle.ngram_scores(instances, turns, N, spacy_tokenizer()))
    assert scored(tmp_path / "memory", benchmarks, turns, "ngram") == expected
    assert scored_by_shards(tmp_path, benchmarks, turns, "ngram") == expected
