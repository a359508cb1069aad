"""The contamination check: rules by hand, reading of rows, shards and their merge, the stage, and known truths."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.compute import ComputeSettings
from schemas.contamination import (
    Benchmark,
    BenchmarkIndexConfig,
    BenchmarkIndexInputs,
    ContaminationInputs,
    ContaminationRules,
    ContaminationSettings,
    ContaminationStageConfig,
)
from schemas.data import DataSource
from tasks.adapters import adapt
from tasks.contamination import check_contamination
from tasks.contamination_build import build_index, spacy_tokenizer
from tasks.contamination_build_kernels import normalise_all
from tasks.contamination_engine import best_scores, load_index, plan_shards, scan_shard, scan_texts
from tasks.contamination_index import LoadedBenchmark, build_benchmark_index, load_benchmark
from tasks.contamination_merge import merge
from tasks.contamination_rows import read_blocks
from tasks.contamination_text_kernels import LOWER_BYTES, LOWER_CODE_POINTS
from tasks.data import read_rows
from tasks.stage import StageContext

needs_spacy = pytest.mark.skipif(
    importlib.util.find_spec("spacy") is None, reason="spaCy is not installed (optional: n-gram mode)"
)
DATA = Path(os.environ.get("SMOLTULU_REAL_DATA") or Path(__file__).parents[2] / "shared" / "data")
ROOT = Path(__file__).parents[1]
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


@pytest.mark.skipif(importlib.util.find_spec("spacy") is not None, reason="spaCy is installed")
def test_ngram_mode_without_spacy_says_what_to_install():
    with pytest.raises(ValueError, match=r"pip install 'spacy"):
        spacy_tokenizer()


def test_kernels_are_compiled_where_nothing_can_be_written():
    """Neither the checkout nor a cache folder: compiled anew, in the process."""
    code = (
        "import os, sys; from pathlib import Path; import tasks.contamination_compile as compiling;"
        "Path.mkdir = lambda *a, **k: (_ for _ in ()).throw(PermissionError());"
        "double = compiling.kernel(lambda x: 2 * x); assert compiling._folder() is None; print(double(21))"
    )
    printed = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True, cwd=ROOT)
    assert printed.stdout == "42\n"


# Reading rows.


def turns_of(path, roles=("user",), shard_bytes=1 << 40):
    """(row, index, text) of every turn, row ids, and lines by their byte ranges."""
    turns, ids, lines, before = [], [], [], 0
    data = path.read_bytes()
    for shard in plan_shards(path, shard_bytes):
        num_rows = 0
        for block, _ in read_blocks(shard, roles):
            for start, end, row, index in zip(
                block.turn_start, block.turn_end, block.turn_row, block.turn_index, strict=True
            ):
                turns.append((before + int(row), int(index), block.text[start:end].tobytes().decode()))
            bounds = block.id_offsets
            ids += [block.ids[a:b].tobytes().decode() for a, b in pairwise(bounds)]
            lines += [data[start:end] for start, end in zip(block.line_start, block.line_end, strict=True)]
            num_rows += block.num_rows
        before += num_rows
    return turns, ids, lines


def expected_turns(rows, roles=("user",)):
    return [
        (number, index, message["content"])
        for number, row in enumerate(rows)
        for index, message in enumerate(
            message for name in ("messages", "prompt", "chosen", "rejected") for message in row.get(name, ())
        )
        if message["role"] in roles
    ]


_message = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()})
_messages = st.lists(_message, max_size=3)
_rows = st.lists(
    st.one_of(
        st.fixed_dictionaries({"id": st.text(max_size=5), "messages": _messages}),
        st.fixed_dictionaries(
            {"id": st.text(max_size=5), "prompt": _messages, "chosen": _messages, "rejected": _messages}
        ),
        st.fixed_dictionaries(
            {"id": st.text(max_size=5), "prompt": _messages, "verifier": st.text(), "n": st.floats(-1, 1)}
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(_rows, st.booleans(), st.sampled_from([(",", ":"), (", ", ": ")]), st.integers(1, 200), st.booleans())
def test_rows_are_read_as_json_reads_them(tmp_path_factory, rows, ascii_only, separators, shard_bytes, both):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = [json.dumps(row, ensure_ascii=ascii_only, separators=separators) + "\n" for row in rows]
    path.write_bytes("".join(text).encode())
    roles = ("user", "assistant") if both else ("user",)
    assert turns_of(path, roles, shard_bytes) == (
        expected_turns(rows, roles), [row["id"] for row in rows], [line.encode() for line in text]
    )  # fmt: skip


def test_unusual_lines_are_left_to_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        b'{"id": "a", "messages": [{"\\u0072ole": "user", "content": "one"}]}\n',  # an escape in a key
        b'  {"messages":[{"content":"t\\u0077o\\ud83d\\ude00","name":{"x":["}"]},"role":"user"}],"id":"b\\n"}  \r\n',
        b"\n",
        b'{"id": "c", "messages": [{"role": "\\u0075ser", "content": "three"}], "messages": []}\n',  # the last
        b'{"id": "d", "rejected": [], "prompt": [{"role": "user", "content": "half \\ud83d!"}], "chosen": []}',
    ]
    path.write_bytes(b"".join(lines))
    expected = [(0, 0, "one"), (1, 0, "two\U0001f600"), (3, 0, "half \ufffd!")]
    turns, ids, found = turns_of(path)
    assert (turns, ids) == (expected, ["a", "b\n", "c", "d"])
    assert b"".join(found) == b"".join(lines).replace(b"\n\n", b"\n")


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b'{"id": "a"}',
        b'{"messages": []}',
        b'{"id": "a", "messages": [{"role": "user"}]}',
        b'{"id": "a", "messages": [{"role": "user", "content": 3}]}',
        b'{"id": "a", "messages": []} x',
        b'{"id": 1, "messages": []}',
        b'{"id": "a", "mess',
    ],
)
def test_what_is_no_normalised_row_is_refused_with_its_place(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    good = b'{"id": "0:0", "messages": []}\n'
    path.write_bytes(good + line + b"\n")
    with pytest.raises(ValueError, match=rf"rows.jsonl, byte {len(good)}: not a normalised row"):
        turns_of(path)


def test_a_row_larger_than_a_block_is_read_whole(tmp_path):
    rows = [
        conversation("0:0", "a"),
        conversation("0:1", "b c " * 3_000_000, "x"),
        conversation("0:2", "d", "y" * 9_000_000),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns, ids, _ = turns_of(path)
    assert turns == expected_turns(rows) and ids == ["0:0", "0:1", "0:2"]


def parquet_rows():
    """Slices, nulls, several chunks: what offsets alone get wrong."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    rows = [
        [{"role": "user", "content": "sliced away"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "\u00e9 one"}],
        None,
        [],
        [{"role": "user", "content": None}, {"role": None, "content": "x"}, {"role": "user", "content": "two"}],
        [{"role": "assistant", "content": "a"}, {"role": "user", "content": ""}],
    ]
    table = pa.table({"id": [f"r{n}" for n in range(len(rows))], "messages": pa.array(rows, pa.list_(message))})
    return pa.concat_tables([table.slice(1, 2), table.slice(3)])


def test_parquet_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(parquet_rows(), path, row_group_size=2)
    assert [(shard.start, shard.end) for shard in plan_shards(path, 1)] == [(0, 1), (1, 2), (2, 3)]
    for shard_bytes in (1, 1 << 30):
        turns = [
            (int(row), int(index), block.text[start:end].tobytes().decode())
            for shard in plan_shards(path, shard_bytes)
            for block, _ in read_blocks(shard, ("user",))
            for start, end, row, index in zip(
                block.turn_start, block.turn_end, block.turn_row, block.turn_index, strict=True
            )
        ]
        assert [turn[1:] for turn in turns] == [(1, "\u00e9 one"), (2, "two"), (1, "")]
    pq.write_table(pa.table({"messages": ["no list"]}), path)
    with pytest.raises(ValueError, match="no list of messages"):
        list(read_blocks(plan_shards(path)[0], ("user",)))


# Shards and their merge.


def scanned(index_folder, path, folder, shard_bytes=1 << 40, **rules):
    folder.mkdir()
    results = [scan_shard(index_folder, shard, folder, **rules) for shard in plan_shards(path, shard_bytes)]
    return merge(index_folder, reversed(results), folder, min_terms=2), (folder / "hits.parquet").read_bytes()


@pytest.mark.parametrize("mode", ["full", "ngram"])
def test_any_partition_gives_the_same_bytes(tmp_path, indexed, mode):
    instances = [("a b c d",), ("b c", "x y"), None, ("z",), ("q q q q",)]
    indexed(instances, mode)
    texts = ["a b c d", "b c", "x b c y x y", "z a b c", "nothing", "z", "", "x y b c d"]
    rows = [conversation(f"0:{n}", *texts[n % 5 :][: 1 + n % 4]) for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = scanned(tmp_path / "index", path, tmp_path / "whole")
    assert whole[0].num_rows == 40 and whole[0].num_hits > 10
    for shard_bytes in (1, 100, 1000):
        assert scanned(tmp_path / "index", path, tmp_path / f"{shard_bytes}", shard_bytes) == whole
    # The same rows in Parquet: all but the byte ranges of lines.
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=7)
    other = scanned(tmp_path / "index", tmp_path / "rows.parquet", tmp_path / "parquet", 1)
    assert other[0] == whole[0]
    tables = [pq.read_table(tmp_path / name / "hits.parquet").to_pylist() for name in ("whole", "parquet")]
    for row in tables[0]:
        row["line_start"] = row["line_end"] = -1
    assert tables[0] == tables[1]


def test_the_first_turn_of_the_highest_score_stands_for_a_row(tmp_path, indexed):
    index = indexed([("a b c d",)], "ngram")
    rows = [conversation("0:0", "a b c", "a b c d", "a b c d", "x", "A b c d")]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n")
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
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(conversation(f"0:{n}", "a b")) + "\n" for n in range(3)]
    path.write_text("".join(lines))
    [shard] = plan_shards(path)
    read = []

    def again(**rules):
        read.clear()
        result = scan_shard(
            tmp_path / "index", shard, tmp_path / "out", report=lambda *told: read.append(told), **rules
        )
        return bool(read), result

    first = again()
    assert first[0] and first[1].num_hits == 3
    assert again() == (False, first[1])
    (tmp_path / "out" / "shard-00000.1.partial").mkdir()  # what a killed scan leaves
    assert again() == (False, first[1])
    assert again(roles=("assistant",))[1].num_hits == 0
    assert again() == first  # the other rule's result was in its place
    path.write_text(lines[0].replace("a b", "a c") + "".join(lines[1:]))
    assert again()[1].num_hits == 2
    (tmp_path / "out" / "shard-00000" / "result.json").write_text("{")
    assert again()[0]


def test_merge_refuses_missing_shards(tmp_path, indexed):
    indexed([("a b",)])
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(conversation("0:0", "a b")) + "\n") * 3)
    shards = plan_shards(path, 1)
    results = [scan_shard(tmp_path / "index", shard, tmp_path) for shard in shards[:2]]
    with pytest.raises(ValueError, match=r"given are \[0, 1\], wanted 0 to 2"):
        merge(tmp_path / "index", results, tmp_path)


def test_matching_texts_are_cut_and_long_terms_are_reported(tmp_path, indexed):
    long = " ".join(["\u00e9\u00e9\u00e9"] * 60)  # 239 characters
    indexed([(long,)])
    path = tmp_path / "rows.jsonl"
    rows = [conversation("0:0", f"x {long} y"), conversation("0:1", "z" * 32_767), conversation("0:2", "z" * 32_766)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    merged, _ = scanned(tmp_path / "index", path, tmp_path / "results")
    assert pq.read_table(tmp_path / "results" / "hits.parquet")["text"].to_pylist() == [long[:199] + "\u2026"]
    assert merged.num_oversized_terms == 1


# The stage.

LEAK = "How many apples does Ann have after lunch today?"  # nine terms


def conversation(row_id, *texts):
    roles = ("user", "assistant")
    return {"id": row_id, "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


ROWS = [
    conversation("0:0", "hello", LEAK, "thanks", "bye"),  # in an assistant turn: not looked at
    conversation("0:1", "hello", "hi", f"And now: {LEAK}", "2"),
    conversation("0:3", "How many apples does Ann have", "x", "after lunch today", "y"),  # over two turns
    conversation("0:4", "What about inflation \u00e9?", "z"),
]
BENCHMARK = [
    {"q": "Question: none of it", "p": "a"},
    {"q": f"Question: {LEAK}", "p": "and NOW"},
    {"q": "Question: Inflation", "p": "what"},
    {"q": "Question: hello", "p": None},
    {"q": "Question: hello", "p": ""},
]


def benchmark(tmp_path, rows=BENCHMARK, name="quiz", **rest):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rest = {"query_fields": ("q", "p"), "strip_prefix": "Question: "} | rest
    return Benchmark(name=name, source=DataSource(path=str(path), format="text"), **rest)


def make_context(tmp_path, name, reported=None):
    folder, work = tmp_path / name, tmp_path / f"{name}-work"
    for path in (folder, work):
        path.mkdir(exist_ok=True)
    told = [] if reported is None else reported
    return StageContext(folder, work, ComputeSettings(), lambda *steps, **metrics: told.append((*steps, metrics)))


def run(tmp_path, *benchmarks, rows=ROWS, kind="sft", **rest):
    """Both stages: the index of the benchmarks, then the check of the rows."""
    recipe = ContaminationSettings(benchmarks=benchmarks, **rest)
    indexing = make_context(tmp_path, "index")
    build_benchmark_index(recipe.index_config(), BenchmarkIndexInputs(), indexing)
    dataset = tmp_path / "dataset.jsonl"
    dataset.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    reported = []
    context = make_context(tmp_path, "folder", reported)
    inputs = ContaminationInputs(dataset=str(dataset), index=str(indexing.folder))
    outputs, metrics = check_contamination(recipe.stage_config(kind), inputs, context)
    step, num_steps, told = reported[-1]
    assert step == num_steps and told["num_rows"] == len(rows) and told["rows_per_second"] > 0
    return outputs, metrics


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_stage_removes_what_hits_and_says_why(tmp_path):
    outputs, metrics = run(tmp_path, benchmark(tmp_path))
    folder = tmp_path / "folder"
    source = (tmp_path / "dataset.jsonl").read_bytes().splitlines(keepends=True)
    assert (folder / "rows.jsonl").read_bytes() == source[0] + source[2]
    assert lines(folder / "removed.jsonl") == [
        {"id": "0:1", "reasons": {"quiz": [1]}},
        {"id": "0:4", "reasons": {"quiz": [2]}},
    ]
    shared = {"turn": 2, "instance": 1, "benchmark": "quiz", "benchmark_row": 1, "score": 1.0, "num_terms": 11}
    places = [sum(map(len, source[:number])) for number in range(5)]
    assert pq.read_table(folder / "hits.parquet").to_pylist() == [
        {"row": 1, "row_id": "0:1", **shared, "text": LEAK[:-1], "line_start": places[1], "line_end": places[2]},
        {"row": 3, "row_id": "0:4", **shared, "turn": 0, "instance": 2, "benchmark_row": 2, "num_terms": 2,
         "text": "inflation", "line_start": places[3], "line_end": places[4]},
    ]  # fmt: skip
    [report] = outputs.benchmarks
    # five instances: one has a null field (left out), one an empty field (stays, never matches)
    assert (report.num_instances, report.num_skipped, report.num_unmatchable) == (4, 1, 1)
    assert (report.num_contaminated, report.num_short_hits, report.share) == (2, 1, 0.5)
    assert (outputs.num_rows_read, outputs.num_rows, outputs.num_removed) == (4, 2, 2)
    assert metrics["contaminated_share/quiz"] == 0.5 and metrics["num_removed"] == 2.0
    assert (outputs.num_hits, outputs.num_turns, outputs.mode, outputs.roles) == (2, 7, "full", ("user",))
    assert sorted(path.name for path in folder.iterdir()) == ["hits.parquet", "removed.jsonl", "rows.jsonl"]


def test_policy_report_keeps_every_row(tmp_path):
    outputs, _ = run(tmp_path, benchmark(tmp_path), policy="report")
    assert (tmp_path / "folder" / "rows.jsonl").read_bytes() == (tmp_path / "dataset.jsonl").read_bytes()
    assert (outputs.num_removed, outputs.num_rows_contaminated) == (0, 2)
    assert lines(tmp_path / "folder" / "removed.jsonl") == []


def test_min_terms_spares_rows_hit_by_short_instances_only(tmp_path):
    outputs, _ = run(tmp_path, benchmark(tmp_path), min_terms=3)
    assert [row["id"] for row in lines(tmp_path / "folder" / "removed.jsonl")] == ["0:1"]
    assert outputs.benchmarks[0].num_contaminated == 2 and outputs.num_rows_contaminated == 2  # still reported
    run(tmp_path, benchmark(tmp_path), min_terms=12, policy="fail", fail_above=0.0)


def test_policy_fail_names_benchmark_and_share_and_keeps_the_evidence(tmp_path):
    other = benchmark(tmp_path, [{"q": "nothing", "p": "here"}], name="other")
    run(tmp_path, benchmark(tmp_path), other, policy="fail", fail_above=0.5)  # not above
    (tmp_path / "folder" / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match=r"40\.00% \(fail_above\) of quiz: 2 of 4 instances \(50\.00%\)") as error:
        run(tmp_path, benchmark(tmp_path), other, policy="fail", fail_above=0.4)
    assert "other" not in str(error.value)
    assert not list((tmp_path / "folder").glob("rows*"))
    assert pq.read_table(tmp_path / "folder-work" / "hits.parquet").num_rows == 2


def test_an_empty_training_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="all 1 training rows hit a benchmark"):
        run(tmp_path, benchmark(tmp_path), rows=ROWS[1:2])
    with pytest.raises(ValueError, match="has no row to check"):
        run(tmp_path, benchmark(tmp_path), rows=[])
    assert not list((tmp_path / "folder").glob("rows*"))


@pytest.mark.parametrize("kind", ["preference", "rlvr"])
def test_prompts_of_other_kinds_are_searched(tmp_path, kind):
    prompt = [{"role": "user", "content": f"and now {LEAK}"}]
    answer = [{"role": "assistant", "content": f"and now {LEAK}"}]
    rest = {"chosen": answer, "rejected": answer} if kind == "preference" else {"verifier": "gsm8k"}
    clean = [{"role": "user", "content": "something else"}]
    rows = [{"id": "0:0", "prompt": prompt, **rest}, {"id": "0:1", "prompt": clean, **rest}]
    outputs, _ = run(tmp_path, benchmark(tmp_path), rows=rows, kind=kind)
    assert [row["id"] for row in lines(tmp_path / "folder" / "rows.jsonl")] == ["0:1"]
    assert outputs.kind == kind


def test_assistant_turns_are_searched_where_asked_for(tmp_path):
    rows = [conversation("0:0", "hello", f"And now, {LEAK}", "thanks", "bye"), *ROWS[1:]]
    outputs, _ = run(tmp_path, benchmark(tmp_path), rows=rows, roles=("user", "assistant"))
    assert [row["id"] for row in lines(tmp_path / "folder" / "removed.jsonl")] == ["0:0", "0:1", "0:4"]
    assert outputs.roles == ("user", "assistant") and outputs.num_turns == 14
    prompt, leak = [{"role": "user", "content": "x"}], [{"role": "assistant", "content": f"And now, {LEAK}"}]
    rows = [{"id": f"0:{n}", "prompt": prompt, "chosen": prompt, "rejected": prompt} for n in range(3)]
    rows[0]["chosen"], rows[1]["rejected"] = leak, leak
    outputs, _ = run(tmp_path, benchmark(tmp_path), rows=rows, kind="preference", roles=("assistant",))
    assert outputs.num_removed == 2
    hits = pq.read_table(tmp_path / "folder" / "hits.parquet").to_pylist()
    assert [(hit["row_id"], hit["turn"]) for hit in hits] == [("0:0", 1), ("0:1", 2)]
    with pytest.raises(ValueError, match="each may be named once"):
        ContaminationRules(roles=("user", "user"))


def test_a_stopped_stage_takes_up_its_finished_shards(tmp_path, monkeypatch):
    import tasks.contamination_engine as engine

    rows = [conversation(f"0:{n}", LEAK if n == 7 else "hello", "and now") for n in range(20)]
    monkeypatch.setattr(engine, "plan_shards", lambda path: plan_shards(path, 200))
    real, calls = engine.scan_shard, []

    def scan(index, shard, folder, **rest):
        calls.append(shard.number)
        if shard.number == 3 and len(calls) < 100:
            raise RuntimeError("power cut")
        return real(index, shard, folder, **rest)

    monkeypatch.setattr(engine, "scan_shard", scan)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, benchmark(tmp_path), rows=rows)
    finished = {path.name: path.stat().st_ino for path in (tmp_path / "folder-work" / "shards").iterdir()}
    assert {"shard-00000", "shard-00001", "shard-00002"} <= set(finished) and "shard-00003" not in finished
    calls += [0] * 100
    before = (tmp_path / "dataset.jsonl").stat()
    os_utime = os.utime
    write = Path.write_text

    def write_as_before(path, *text, **rest):
        write(path, *text, **rest)
        if path.name == "dataset.jsonl":
            os_utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    monkeypatch.setattr(Path, "write_text", write_as_before)
    outputs, _ = run(tmp_path, benchmark(tmp_path), rows=rows)
    assert outputs.num_rows_read == 20
    again = {path.name: path.stat().st_ino for path in (tmp_path / "folder-work" / "shards").iterdir()}
    assert finished.items() <= again.items()


def test_an_index_of_another_mode_is_refused(tmp_path):
    run(tmp_path, benchmark(tmp_path))
    config = ContaminationStageConfig(kind="sft", settings=ContaminationRules(mode="ngram"))
    inputs = ContaminationInputs(dataset=str(tmp_path / "dataset.jsonl"), index=str(tmp_path / "index"))
    with pytest.raises(ValueError, match="index is for mode full"):
        check_contamination(config, inputs, make_context(tmp_path, "other"))
    with pytest.raises(ValueError, match="no benchmark index"):
        check_contamination(config, inputs.model_copy(update={"index": str(tmp_path)}), make_context(tmp_path, "other"))


def test_the_index_does_not_depend_on_what_only_the_scan_needs():
    given = Benchmark(name="x", source=DataSource(path="x.json", format="text"), query_fields=("q",))
    one = ContaminationSettings(benchmarks=(given,))
    for change in (
        {"policy": "fail"},
        {"match_threshold": 0.3},
        {"min_terms": 8},
        {"roles": ("assistant",)},
        {"ngram_size": 9},
    ):
        assert ContaminationSettings(benchmarks=(given,), **change).index_config() == one.index_config()
    ngrams = [ContaminationSettings(benchmarks=(given,), mode="ngram", ngram_size=n).index_config() for n in (8, 9)]
    assert ngrams[0] != ngrams[1] and one.index_config() not in ngrams
    assert isinstance(ngrams[0], BenchmarkIndexConfig)


def test_what_cannot_be_loaded_is_not_checked_never_zero(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read once, at import
    gated = Benchmark(name="gated", source=DataSource(repository="a/b", format="text"), query_fields=("q",))
    outputs, metrics = run(tmp_path, gated, benchmark(tmp_path))
    report = outputs.benchmarks[0]
    assert report.share is None and "cannot be reached" in report.not_checked
    assert "contaminated_share/gated" not in metrics and metrics["contaminated_share/quiz"] == 0.5
    with pytest.raises(ValueError, match="none of the 1 benchmarks could be loaded"):
        run(tmp_path, gated)


@pytest.mark.parametrize(
    ("rows", "rest", "message"),
    [
        (BENCHMARK, {"query_fields": ("qq",)}, r"no column qq; query_fields may name p, q"),
        ([{"q": 3, "p": "a"}], {}, r"column 'q' of row 0 holds a int"),
        ([[1]], {}, "rows that are not objects"),
        ([], {}, "has no rows"),
    ],
)
def test_faults_of_a_benchmark_are_the_users_to_mend(tmp_path, rows, rest, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, benchmark(tmp_path, rows, **rest))


def test_a_query_of_messages_is_its_last_user_turn(tmp_path):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": LEAK}]
    loaded = load_benchmark(benchmark(tmp_path, [{"q": messages}, {"q": None}], query_fields=("q",), strip_prefix=""))
    assert loaded.queries == [(LEAK,), None]
    with pytest.raises(ValueError, match="holds a list"):
        load_benchmark(benchmark(tmp_path, [{"q": messages[:1]}], query_fields=("q",)))


def test_a_missing_benchmark_file_is_an_error(tmp_path):
    missing = Benchmark(name="x", source=DataSource(path=str(tmp_path / "no.json"), format="text"), query_fields=("q",))
    with pytest.raises(ValueError, match="does not exist"):
        run(tmp_path, missing, benchmark(tmp_path))


# Known truths in the real data.


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    """Folders with an index of GSM8K's test questions, by mode."""
    source = DataSource(path=str(DATA / "eval" / "gsm8k_test.jsonl.gz"), format="text")
    loaded = load_benchmark(Benchmark(name="gsm8k", source=source, query_fields=("question",)))
    assert len(loaded.queries) == 1319
    folders = {}
    for mode in ("full", "ngram"):
        folders[mode] = tmp_path_factory.mktemp(mode)
        build_index(folders[mode], [loaded], mode)
    return folders


@needs_data
@needs_spacy
@pytest.mark.parametrize(
    ("train", "fields", "mode", "num_found"),
    [
        ("math_cot.json.gz", {"question": "instruction"}, "full", 1055),
        ("math_cot.json.gz", {"question": "instruction"}, "ngram", 1055),
        ("gsm8k_train.jsonl.gz", {}, "full", 0),
        ("gsm8k_train.jsonl.gz", {}, "ngram", 2),
    ],
)
def test_known_leaks_of_gsm8k(gsm8k, train, fields, mode, num_found):
    source = DataSource(path=str(DATA / "train" / train), format="question_answer", fields=fields)
    turns = [adapt(row, source)["messages"][0]["content"] for row in read_rows(source)]
    assert len({hit.instance for hit in scan_texts(load_index(gsm8k[mode]), turns)}) == num_found


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
