"""The contamination engine: rules by hand in both modes, shards and their merge, and known truths in real data."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.schemas.contamination import Benchmark
from smoltulu.schemas.data import DataSource
from smoltulu.tasks.contamination.build import build_index, spacy_tokenizer
from smoltulu.tasks.contamination.index import LoadedBenchmark, load_benchmark
from smoltulu.tasks.contamination.kernels.build import normalise_all
from smoltulu.tasks.contamination.kernels.text import LOWER_BYTES, LOWER_CODE_POINTS
from smoltulu.tasks.contamination.merge import merge
from smoltulu.tasks.contamination.rows import plan_shards
from smoltulu.tasks.contamination.scan import ShortRule, load_index, scan_shard
from smoltulu.tasks.data.formats import adapt
from smoltulu.tasks.data.sources import read_rows
from tests import ROOT
from tests.rows_file import write_rows
from tests.tasks.contamination.contamination_fuzz import conversation
from tests.tasks.contamination.contamination_texts import best_scores, scan_texts

needs_spacy = pytest.mark.skipif(
    importlib.util.find_spec("spacy") is None, reason="spaCy is not installed (optional: n-gram mode)"
)
DATA = Path(os.environ.get("SMOLTULU_REAL_DATA") or ROOT.parent / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data absent: {DATA} (set SMOLTULU_REAL_DATA)")

# The analyzer.


def normalised(texts):
    """Terms of each text, joined by one space, as the compiled scan sees them."""
    data = [text.encode() for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in data])]).astype(np.int64)
    source = np.frombuffer(bytearray(b"".join(data)), np.uint8)
    out, bounds, num_terms = normalise_all(source, offsets, LOWER_BYTES, LOWER_CODE_POINTS)
    found = [out[start:end].tobytes().decode() for start, end in pairwise(bounds)]
    assert [len(text.split(" ")) if text else 0 for text in found] == num_terms.tolist()
    return found


def test_terms_by_hand():
    # no separators: tab, CR, NBSP, apostrophe, most symbols, punctuation outside ASCII, unspaced Chinese
    texts = ['A-b ,.?!:;()"-c\nD\\e  f', "don't a\tb c\rd e\u00a0f _x_ ${1} [2]*/=+`", "\u4f60\u597d\u3002\u4e16", ""]
    assert normalised([*texts, ' ,.?!:;()"-\n\\']) == [
        "a b c d e f", "don't a\tb c\rd e\u00a0f _x_ ${1} [2]*/=+`", "\u4f60\u597d\u3002\u4e16", "", ""
    ]  # fmt: skip


def test_lower_casing_is_that_of_python_per_code_point_for_all_of_unicode():
    """The table equals lower() of the whole text after the two code points in which Java differs are mapped."""
    points = [chr(point) for point in range(1, 0x110000) if not 0xD800 <= point < 0xE000]
    expected = "".join(points).replace("\u0130", "i").replace("\u03a3", "\u03c3").lower()
    kept = "".join(point for point in points if point not in ' ,.?!:;()"-\n\\')
    assert normalised([kept]) == [kept.replace("\u0130", "i").replace("\u03a3", "\u03c3").lower()]
    # one to one, so that no text can be longer in code points, and context plays no part but for the final sigma
    assert len(expected) == len(points)
    assert normalised(["\u0130STANBUL \u039f\u0394\u039f\u03a3 \u212a \u1e9e"]) == [
        "istanbul \u03bf\u03b4\u03bf\u03c3 k \u00df"
    ]


@given(st.text())
def test_terms_are_those_of_a_split(text):
    lowered = text.replace("\u0130", "i").replace("\u03a3", "\u03c3").lower()
    assert normalised([text]) == [" ".join(piece for piece in re.split(r'[ ,.?!:;()"\-\n\\]', lowered) if piece)]


# Both modes.


def words(text):
    return [match.span() for match in re.finditer(r"\S+", text)]


@pytest.fixture
def indexed(tmp_path):
    """Instances -> an index of them, in a folder of its own."""

    def make(instances, mode="full", n=2, name="index", tokenize=words):
        folder = tmp_path / name
        folder.mkdir()
        build_index(folder, [LoadedBenchmark("quiz", list(instances))], mode, n, tokenize)
        return load_index(folder)

    return make


def full(index, text):
    return [hit.instance for hit in scan_texts(index, [text])]


def test_full_match_by_hand(indexed):
    index = indexed([("Who is it?",), ("passage one", "who is it"), ("",), ("who", "-"), ("it who",), ("IT",)])
    assert full(index, "Tell me: WHO, is - it") == [0, 5]
    assert full(index, "Passage  one\nwho is it") == [0, 1, 5]  # the order of the fields does not matter
    assert full(index, "who is its") == []  # whole terms only
    assert full(index, "") == []
    assert full(index, "is it") == [5]
    assert (index.best_possible == 0).tolist() == [False, False, True, True, False, False]
    assert index.num_terms.tolist() == [3, 5, 0, 1, 2, 1]
    # no match crosses turns
    assert scan_texts(index, ["who is", "it"])[0].turn == 1 and len(scan_texts(index, ["who is", "it"])) == 1


def test_the_matching_text_is_the_first_place_as_it_is_written(indexed):
    index = indexed([("is it",)])
    text = "\u0130\u1e9e\u212a - who IS,  it? is it"
    [hit] = scan_texts(index, [text])
    assert (hit.text, hit.score) == ("IS,  it", 1.0)


def test_a_field_that_repeats_in_an_instance_or_is_shared_is_looked_up_once(indexed):
    index = indexed([("a b", "A-B"), ("a b", "rare"), ("a b", "other"), ("a b",)])
    assert full(index, "x a b y") == [0, 3]
    assert full(index, "rare a b") == [0, 1, 3]


def test_phrases_longer_than_the_anchor_and_turns_longer_than_a_piece(indexed):
    # 1,024 terms are hashed at a time; the phrase lies over that bound, and at the very end
    phrase = " ".join(f"t{number}" for number in range(40))
    index = indexed([(phrase,), (f"{phrase} end",), ("end",)])
    for before in (0, 984, 1000, 1015, 1016, 1017, 1023, 1024, 1025, 2047):
        text = "x " * before + phrase
        assert full(index, text) == [0], before
        assert full(index, f"{text} x end") == [0, 2], before
        assert full(index, f"{text} end") == [0, 1, 2], before
        assert full(index, text.removesuffix("9")) == [], before


def ngram(index, text, threshold=0.5):
    return {hit.instance: hit.score for hit in scan_texts(index, [text], threshold)}


def test_ngram_coverage_by_hand(indexed):
    # windows ab, bc, cd; "a b" and "c d" cover all four tokens, "a b" alone two of four: not above one half
    index = indexed([("a b c d",)], "ngram", name="one")
    assert ngram(index, "a b x c d") == {0: 1.0}
    assert ngram(index, "a b") == {}
    assert ngram(index, "a b", threshold=0.49) == {0: 0.5}
    assert ngram(index, "a b c") == {0: 0.75}
    assert best_scores(index, ["a b", "x", "b c"]).tolist() == [0.5]  # at the threshold: no hit, but a score
    # two fields: (3/4 + 1) / 2
    assert ngram(indexed([("a b c d", "x y")], "ngram", name="two"), "a b c, x y") == {0: 0.875}
    # a field shorter than the window counts 0
    assert ngram(indexed([("a b c d", "x")], "ngram", name="short"), "a b c d x", threshold=0.4) == {0: 0.5}


def test_ngram_repeated_span_keeps_only_its_last_position(indexed):
    # tokens: a b a b c; windows "a b" (kept at 2 only), "b a" at 1, "b c" at 3
    index = indexed([("a b a b c",)], "ngram")
    assert ngram(index, "a b", threshold=0.3) == {0: 2 / 5}
    assert ngram(index, "a b a b c") == {0: 4 / 5}  # an exact copy: token 0 is never covered


def test_ngram_windows_without_terms_match_nothing(indexed):
    index = indexed([("- - - -",), ("a b c d",), ("a",)], "ngram")
    assert (index.best_possible <= 0.5).tolist() == [True, False, True]
    assert ngram(index, "- - - -", threshold=0.01) == {}


def test_ngram_matching_text_runs_from_the_first_to_the_last_window(indexed):
    [hit] = scan_texts(indexed([("a b c d",)], "ngram"), ["x A b - y c D z"])
    assert hit.text == "A b - y c D"


def test_a_set_of_phrases_that_gave_no_hit_is_remembered_without_changing_an_answer(tmp_path, indexed):
    """Under and over the threshold, in every order, more sets than are remembered, and over a block of the scan."""
    letters = [chr(code) for code in range(ord("a"), ord("a") + 13)]
    quarters = [" ".join(f"{letter}{number}" for number in range(4)) for letter in letters]
    instances = [(" ".join(quarters[first : first + 4]),) for first in range(10)]  # each quarter in four instances
    index = indexed(instances, "ngram", 4)
    turns = [
        " x ".join(quarters[k] for k in order)
        for size in (1, 2, 3, 4)
        for chosen in combinations(range(13), size)
        for order in (chosen, chosen[::-1])
    ]
    wanted = {
        (number, instance): share
        for number, turn in enumerate(turns)
        for instance in range(10)
        if (share := sum(quarters[k] in turn for k in range(instance, instance + 4)) / 4) > 0.5
    }
    assert len(turns) > 2_000 and len(wanted) > 100
    turns *= 4
    hits = {(hit.turn, hit.instance): hit.score for hit in scan_texts(index, turns)}
    assert hits == {(copy * len(turns) // 4 + n, i): score for copy in range(4) for (n, i), score in wanted.items()}
    assert best_scores(index, turns).tolist() == [1.0] * 10
    low = [f"{quarters[k]} x" for k in (0, 12, 0, 1, 12, 1, 0)]
    assert best_scores(index, low).tolist() == [0.25, 0.25, *[0.0] * 7, 0.25]
    # the row of the best score is the first one, whatever is remembered
    path = write_rows(tmp_path / "rows.parquet", [conversation(f"0:{n}", text) for n, text in enumerate(low)])
    result = scan_shard(tmp_path / "index", plan_shards(path)[0], tmp_path / "out")
    with np.load(Path(result.folder) / "best.npz") as best:
        assert (best["instance"].tolist(), best["row"].tolist()) == ([0, 1, 9], [0, 3, 1])


@needs_spacy
def test_ngram_mode_uses_spacys_tokens(indexed):
    tokenize = spacy_tokenizer()
    text = "I don't  know.\n"
    assert [text[start:end] for start, end in tokenize(text)] == ["I", "do", "n't", " ", "know", ".", "\n"]
    # seven words, nine tokens ("n't" and "." are tokens of their own): long enough for one 8-token window
    question = "Why don't cats like water in summer."
    index = indexed([(question,), ("Why do cats like water?",), ("",)], "ngram", 8, tokenize=None)
    assert (index.best_possible <= 0.5).tolist() == [False, True, True]
    assert full(index, f"Please say: {question}") == [0]


def test_ngram_mode_without_spacy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)  # as if it were not there
    with pytest.raises(ValueError, match=r"pip install 'spacy"):
        spacy_tokenizer()


def test_kernels_are_compiled_where_nothing_can_be_written():
    """Neither the checkout nor a cache folder: compiled anew, in the process."""
    code = (
        "import os, sys; from pathlib import Path; import smoltulu.tasks.contamination.kernels.compile as compiling;"
        "Path.mkdir = lambda *a, **k: (_ for _ in ()).throw(PermissionError());"
        "double = compiling.kernel(lambda x: 2 * x); assert compiling._folder() is None; print(double(21))"
    )
    printed = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True, cwd=ROOT)
    assert printed.stdout == "42\n"


# Shards and their merge.


def scanned(index_folder, path, folder, shard_bytes=1 << 40, **rules):
    folder.mkdir()
    results = [scan_shard(index_folder, shard, folder, **rules) for shard in plan_shards(path, shard_bytes)]
    return merge(index_folder, reversed(results), folder, short=ShortRule(min_terms=2)), (
        folder / "hits.parquet"
    ).read_bytes()


@pytest.mark.parametrize("mode", ["full", "ngram"])
def test_any_partition_gives_the_same_bytes(tmp_path, indexed, mode):
    instances = [("a b c d",), ("b c", "x y"), None, ("z",), ("q q q q",)]
    indexed(instances, mode)
    texts = ["a b c d", "b c", "x b c y x y", "z a b c", "nothing", "z", "", "x y b c d"]
    rows = [conversation(f"0:{n}", *texts[n % 5 :][: 1 + n % 4]) for n in range(40)]
    path = write_rows(tmp_path / "rows.parquet", rows, group_rows=3)
    whole = scanned(tmp_path / "index", path, tmp_path / "whole")
    assert whole[0].num_rows == 40 and whole[0].num_hits > 10
    num_shards = [len(plan_shards(path, shard_bytes)) for shard_bytes in (1, 500, 2000)]
    assert num_shards[0] == 14 > num_shards[1] > num_shards[2] > 1
    for shard_bytes in (1, 500, 2000):
        assert scanned(tmp_path / "index", path, tmp_path / f"{shard_bytes}", shard_bytes) == whole
    # Of other row groups, too.
    other = write_rows(tmp_path / "other.parquet", rows, group_rows=7)
    assert scanned(tmp_path / "index", other, tmp_path / "other", 1) == whole


def test_the_first_turn_of_the_highest_score_stands_for_a_row(tmp_path, indexed):
    index = indexed([("a b c d",)], "ngram")
    rows = [conversation("0:0", "a b c", "a b c d", "a b c d", "x", "A b c d")]
    path = write_rows(tmp_path / "rows.parquet", rows)
    scanned(tmp_path / "index", path, tmp_path / "results")
    [hit] = pq.read_table(tmp_path / "results" / "hits.parquet").to_pylist()
    assert (hit["turn"], hit["score"], hit["text"]) == (2, 1.0, "a b c d")
    assert (hit["benchmark"], hit["benchmark_row"], hit["row_id"], hit["num_terms"]) == ("quiz", 0, "0:0", 4)
    merged, _ = scanned(tmp_path / "index", path, tmp_path / "both", roles=("user", "assistant"))
    assert pq.read_table(tmp_path / "both" / "hits.parquet")["turn"].to_pylist() == [1]
    assert (merged.num_turns, merged.benchmarks[0].mean_score) == (5, 1.0)
    assert index.header.num_phrases == 3


def test_finished_shards_are_not_scanned_again_unless_something_changed(tmp_path, indexed):
    indexed([("a b",)])
    rows = [conversation(f"0:{n}", "a b") for n in range(3)]
    path = write_rows(tmp_path / "rows.parquet", rows)
    [shard] = plan_shards(path)
    read = []

    def again(**rules):
        read.clear()
        result = scan_shard(tmp_path / "index", shard, tmp_path / "out", report=read.append, **rules)
        return bool(read), result

    first = again()
    assert first[0] and first[1].num_hits == 3 and read == [3]
    assert again() == (False, first[1])
    (tmp_path / "out" / "shard-00000.1.partial").mkdir()  # what a killed scan leaves
    assert again() == (False, first[1])
    assert again(roles=("assistant",))[1].num_hits == 0
    assert again() == first  # the other rule's result was in its place
    write_rows(path, [conversation("0:0", "a c"), *rows[1:]])
    assert again()[1].num_hits == 2
    (tmp_path / "out" / "shard-00000" / "result.json").write_text("{")
    assert again()[0]


def test_merge_refuses_missing_shards(tmp_path, indexed):
    indexed([("a b",)])
    path = write_rows(tmp_path / "rows.parquet", [conversation("0:0", "a b")] * 3, group_rows=1)
    shards = plan_shards(path, 1)
    results = [scan_shard(tmp_path / "index", shard, tmp_path) for shard in shards[:2]]
    with pytest.raises(ValueError, match=r"given are \[0, 1\], wanted 0 to 2"):
        merge(tmp_path / "index", results, tmp_path)


def test_matching_texts_are_cut_and_long_terms_are_reported(tmp_path, indexed):
    long = " ".join(["\u00e9\u00e9\u00e9"] * 60)  # 239 characters
    indexed([(long,)])
    rows = [conversation("0:0", f"x {long} y"), conversation("0:1", "z" * 32_767), conversation("0:2", "z" * 32_766)]
    path = write_rows(tmp_path / "rows.parquet", rows)
    merged, _ = scanned(tmp_path / "index", path, tmp_path / "results")
    assert pq.read_table(tmp_path / "results" / "hits.parquet")["text"].to_pylist() == [long[:199] + "\u2026"]
    assert merged.num_oversized_terms == 1


# Known truths in the real data.


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    """A mode -> an index of GSM8K's test questions. (Full mode needs no spaCy.)"""
    source = DataSource(path=str(DATA / "eval" / "gsm8k_test.jsonl.gz"), format="text")
    loaded = load_benchmark(Benchmark(name="gsm8k", source=source, query_fields=("question",)))
    assert len(loaded.queries) == 1319

    @cache
    def make(mode):
        folder = tmp_path_factory.mktemp(mode)
        build_index(folder, [loaded], mode)
        return load_index(folder)

    return make


@needs_data
@pytest.mark.parametrize(
    ("train", "fields", "mode", "num_found"),
    [
        ("math_cot.json.gz", {"question": "instruction"}, "full", 1055),
        pytest.param("math_cot.json.gz", {"question": "instruction"}, "ngram", 1055, marks=needs_spacy),
        ("gsm8k_train.jsonl.gz", {}, "full", 0),
        pytest.param("gsm8k_train.jsonl.gz", {}, "ngram", 2, marks=needs_spacy),
    ],
)
def test_known_leaks_of_gsm8k(gsm8k, train, fields, mode, num_found):
    source = DataSource(path=str(DATA / "train" / train), format="question_answer", fields=fields)
    turns = [adapt(row, source)["messages"][0]["content"] for row in read_rows(source)]
    assert len({hit.instance for hit in scan_texts(gsm8k(mode), turns)}) == num_found


#: Files and query fields of the nine benchmarks of the known figure below.
NINE = {
    "mmlu_test": ("question",), "mmlu_pro_test": ("question",), "humaneval": ("prompt",), "gsm8k_test": ("question",),
    "math_test": ("problem",), "ifeval": ("prompt",), "bbh": ("input",), "truthfulqa": ("Question",),
    "agieval_en": ("passage", "question"),
}  # fmt: skip


@needs_data
@needs_spacy
def test_gsm8k_train_has_five_rows_with_a_hit_of_nine_benchmarks(tmp_path):
    benchmarks = [
        load_benchmark(
            Benchmark(
                name=name,
                source=DataSource(path=str(DATA / "eval" / f"{name}.jsonl.gz"), format="text"),
                query_fields=fields,
            )
        )
        for name, fields in NINE.items()
    ]
    build_index(tmp_path, benchmarks, "ngram")
    index = load_index(tmp_path)
    agieval = index.header.benchmarks[-1]
    assert (agieval.num_instances, agieval.num_skipped) == (2086, 1460)  # null passages
    source = DataSource(path=str(DATA / "train" / "gsm8k_train.jsonl.gz"), format="question_answer")
    turns = [adapt(row, source)["messages"][0]["content"] for row in read_rows(source)]
    assert len(turns) == 7473
    assert len({hit.turn for hit in scan_texts(index, turns)}) == 5
    # under 8 tokens: no window, so no text at all can hit them
    num_tokens = index.ngram.field_tokens[index.ngram.part_field]
    short = {
        name: int((num_tokens[index.ngram.part_offsets[:-1]][index.benchmark == number] < 8).sum())
        for number, name in enumerate(NINE)
    }
    assert [short[name] for name in ("mmlu_test", "mmlu_pro_test", "math_test", "truthfulqa")] == [724, 368, 217, 125]


@needs_data
def test_agieval_keeps_empty_passages_which_never_match_in_full(tmp_path):
    source = DataSource(path=str(DATA / "eval" / "agieval_en.jsonl.gz"), format="text")
    loaded = load_benchmark(Benchmark(name="x", source=source, query_fields=("passage", "question")))
    build_index(tmp_path, [loaded], "full")
    index = load_index(tmp_path)
    assert (index.header.num_instances, int((index.best_possible == 0).sum())) == (2086, 206)
