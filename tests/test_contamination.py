"""The contamination check: rules by hand, the engine against naive references, the stage, and known truths."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.compute import ComputeSettings
from schemas.contamination import Benchmark, ContaminationInputs, ContaminationSettings, ContaminationStageConfig
from schemas.data import DataSource
from tasks.adapters import adapt
from tasks.contamination import check_contamination, load_benchmark, make_matcher
from tasks.contamination_engine import FullMatcher, NgramMatcher, analyze, lower, spacy_tokenizer, term_slice
from tasks.data import read_rows
from tasks.stage import StageContext

needs_spacy = pytest.mark.skipif(
    importlib.util.find_spec("spacy") is None, reason="spaCy is not installed (optional: n-gram mode)"
)
DATA = Path(os.environ.get("SMOLTULU_REAL_DATA") or Path(__file__).parents[2] / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data absent: {DATA} (set SMOLTULU_REAL_DATA)")


# The analyzer.


def test_terms_by_hand():
    assert analyze('A-b ,.?!:;()"-c\nD\\e  f') == ["a", "b", "c", "d", "e", "f"]
    # no separators: tab, CR, NBSP, apostrophe, most symbols, punctuation outside ASCII, unspaced Chinese
    assert analyze("don't a\tb c\rd e\u00a0f _x_ ${1} [2]*/=+`") == [
        "don't",
        "a\tb",
        "c\rd",
        "e\u00a0f",
        "_x_",
        "${1}",
        "[2]*/=+`",
    ]
    assert analyze("\u4f60\u597d\u3002\u4e16\u754c") == ["\u4f60\u597d\u3002\u4e16\u754c"]
    assert analyze("") == analyze(' ,.?!:;()"-\n\\') == []


def test_lower_casing_is_javas():
    assert lower("\u0130STANBUL") == "istanbul"  # Python alone: "i" and a combining dot
    assert lower("\u039f\u0394\u039f\u03a3") == "\u03bf\u03b4\u03bf\u03c3"  # Python alone ends in \u03c2
    assert len(lower("\u0130\u03a3\u1e9e\u212a")) == 4


@given(st.text())
def test_slices_of_the_source_give_back_their_terms(text):
    terms = analyze(text)
    assert "".join(terms) == re.sub(r'[ ,.?!:;()"\-\n\\]', "", lower(text))
    for start in range(len(terms)):
        assert analyze(term_slice(text, start, start + 1)) == terms[start : start + 1]


# Full match.


def full(instances, text):
    return [hit.instance for hit in FullMatcher(instances).hits(text)]


def test_full_match_by_hand():
    instances = [("Who is it?",), ("passage one", "who is it"), ("",), ("who", "-"), ("it who",), ("IT",)]
    assert full(instances, "Tell me: WHO, is - it") == [0, 5]
    assert full(instances, "Passage  one\nwho is it") == [0, 1, 5]  # the order of the fields does not matter
    assert full(instances, "who is its") == []  # whole terms only
    assert full(instances, "") == []
    matcher = FullMatcher(instances)
    assert matcher.unmatchable == [False, False, True, True, False, False]
    assert matcher.num_terms == [3, 5, 0, 1, 2, 1]
    [hit] = FullMatcher([("is it",)]).hits("who is it? is it")
    assert (hit.start, hit.end, hit.score) == (1, 3, 1.0)


def naive_full(instance, text):
    def pieces(value):
        value = value.replace("\u0130", "i").replace("\u03a3", "\u03c3").lower()
        return [piece for piece in re.split(r'[ ,.?!:;()"-]|\n|\\', value) if piece]

    terms = pieces(text)
    return all(
        phrase and any(terms[start : start + len(phrase)] == phrase for start in range(len(terms)))
        for phrase in map(pieces, instance)
    )


# Few words, so that matches, repetitions and phrases longer than the anchor are common.
_texts = st.lists(
    st.sampled_from(["a", "B", "b", "don't", "\u0130", "\u03a3", "-", "\n", "\t", "", "a.b"]), max_size=30
).map(" ".join)
_instances = st.lists(st.lists(_texts, min_size=1, max_size=3).map(tuple), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(_instances, _texts, st.integers(0, 30), st.integers(0, 30))
def test_full_match_equals_the_naive_rule(instances, text, start, length):
    # A piece of the text itself as an instance makes long matches certain to be tried.
    instances = [*instances, (text[start : start + length],), (text,)]
    expected = [number for number, instance in enumerate(instances) if naive_full(instance, text)]
    assert full(instances, text) == expected


# n-gram match. Tokens of the hand-made cases are simply words, so that the arithmetic can be followed.


def words(text):
    return [match.span() for match in re.finditer(r"\S+", text)]


def ngram(instances, text, n=2, threshold=0.5):
    return {hit.instance: hit.score for hit in NgramMatcher(instances, words, n, threshold).hits(text)}


def test_ngram_coverage_by_hand():
    # windows ab, bc, cd; "a b" and "c d" cover all four tokens, "a b" alone two of four: not above one half
    assert ngram([("a b c d",)], "a b x c d") == {0: 1.0}
    assert ngram([("a b c d",)], "a b") == {}
    assert ngram([("a b c d",)], "a b", threshold=0.49) == {0: 0.5}
    assert ngram([("a b c d",)], "a b c") == {0: 0.75}
    # two fields: (3/4 + 1) / 2
    assert ngram([("a b c d", "x y")], "a b c, x y") == {0: 0.875}
    # a field shorter than the window counts 0
    assert ngram([("a b c d", "x")], "a b c d x", threshold=0.4) == {0: 0.5}


def test_ngram_repeated_span_keeps_only_its_last_position():
    # tokens: a b a b c; windows "a b" (kept at 2 only), "b a" at 1, "b c" at 3
    assert ngram([("a b a b c",)], "a b", threshold=0.3) == {0: 2 / 5}
    assert ngram([("a b a b c",)], "a b a b c") == {0: 4 / 5}  # an exact copy: token 0 is never covered


def test_ngram_windows_without_terms_match_nothing():
    matcher = NgramMatcher([("- - - -",), ("a b c d",), ("a",)], words, 2, 0.5)
    assert matcher.unmatchable == [True, False, True]
    assert matcher.hits("- - - -") == []


def naive_ngram(instance, text, tokenize, n):
    terms = analyze(text)
    coverages = []
    for field in instance:
        spans = tokenize(field)
        last = {}
        for first in range(len(spans) - n + 1):
            last[field[spans[first][0] : spans[first + n - 1][1]]] = first
        covered = set()
        for window, first in last.items():
            phrase = analyze(window)
            if phrase and any(terms[at : at + len(phrase)] == phrase for at in range(len(terms))):
                covered.update(range(first, first + n))
        coverages.append(len(covered) / len(spans) if covered else 0.0)
    return sum(coverages) / len(instance)


@settings(max_examples=200, deadline=None)
@given(_instances, _texts, st.integers(1, 4), st.sampled_from([0.2, 0.5, 0.8]))
def test_ngram_match_equals_the_naive_rule(instances, text, n, threshold):
    instances = [*instances, (text,)]
    scores = {number: naive_ngram(instance, text, words, n) for number, instance in enumerate(instances)}
    expected = {number: score for number, score in scores.items() if score > threshold}
    assert ngram(instances, text, n, threshold) == pytest.approx(expected)
    unmatchable = NgramMatcher(instances, words, n, threshold).unmatchable
    assert not any(unmatchable[number] for number in expected)


@needs_spacy
def test_ngram_mode_uses_spacys_tokens():
    tokenize = spacy_tokenizer()
    text = "I don't  know.\n"
    assert [text[start:end] for start, end in tokenize(text)] == ["I", "do", "n't", " ", "know", ".", "\n"]
    # seven words, nine tokens ("n't" and "." are tokens of their own): long enough for one 8-token window
    question = "Why don't cats like water in summer."
    matcher = NgramMatcher([(question,), ("Why do cats like water?",)], tokenize, 8, 0.5)
    assert matcher.unmatchable == [False, True]
    assert [hit.instance for hit in matcher.hits(f"Please say: {question}")] == [0]


@pytest.mark.skipif(importlib.util.find_spec("spacy") is not None, reason="spaCy is installed")
def test_ngram_mode_without_spacy_says_what_to_install():
    with pytest.raises(ValueError, match=r"pip install 'spacy"):
        spacy_tokenizer()


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


def run(tmp_path, *benchmarks, rows=ROWS, kind="sft", **rest):
    for name in ("folder", "work"):
        (tmp_path / name).mkdir(exist_ok=True)
    dataset = tmp_path / "dataset.jsonl"
    dataset.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    reported = []
    context = StageContext(
        tmp_path / "folder", tmp_path / "work", ComputeSettings(), lambda *a, **m: reported.append((*a, m))
    )
    config = ContaminationStageConfig(kind=kind, settings=ContaminationSettings(benchmarks=benchmarks, **rest))
    outputs, metrics = check_contamination(config, ContaminationInputs(dataset=str(dataset)), context)
    assert reported[-1][:2] == (len(rows), len(rows))
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
    assert lines(folder / "hits.jsonl") == [
        {
            "benchmark": "quiz",
            "instance": 1,
            "row": "0:1",
            "turn": 2,
            "score": 1.0,
            "num_terms": 11,
            "text": LEAK[:-1],
        },
        {
            "benchmark": "quiz",
            "instance": 2,
            "row": "0:4",
            "turn": 0,
            "score": 1.0,
            "num_terms": 2,
            "text": "inflation",
        },
    ]
    [report] = outputs.benchmarks
    # five instances: one has a null field (left out), one an empty field (stays, never matches)
    assert (report.num_instances, report.num_skipped, report.num_unmatchable) == (4, 1, 1)
    assert (report.num_contaminated, report.num_short_hits, report.share) == (2, 1, 0.5)
    assert (outputs.num_rows_read, outputs.num_rows, outputs.num_removed) == (4, 2, 2)
    assert metrics["contaminated_share/quiz"] == 0.5 and metrics["num_removed"] == 2.0
    assert sorted(path.name for path in folder.iterdir()) == ["hits.jsonl", "removed.jsonl", "rows.jsonl"]


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
    assert len(lines(tmp_path / "work" / "hits.jsonl")) == 2


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


def real_benchmark(name, *fields):
    source = DataSource(path=str(DATA / "eval" / name), format="text")
    return load_benchmark(Benchmark(name=name.partition(".")[0], source=source, query_fields=fields))


def num_found(train, fields, queries, **rest):
    unused = Benchmark(name="x", source=DataSource(path="x.json", format="text"), query_fields=("q",))
    matcher = make_matcher(queries, ContaminationSettings(benchmarks=(unused,), **rest))
    source = DataSource(path=str(DATA / "train" / train), format="question_answer", fields=fields)
    turns = [adapt(row, source)["messages"][0]["content"] for row in read_rows(source)]
    return len({hit.instance for turn in turns for hit in matcher.hits(turn)})


@needs_data
def test_known_leak_of_gsm8k_is_found_in_full():
    queries = real_benchmark("gsm8k_test.jsonl.gz", "question").queries
    assert len(queries) == 1319
    assert num_found("math_cot.json.gz", {"question": "instruction"}, queries) == 1055
    assert num_found("gsm8k_train.jsonl.gz", {}, queries) == 0


@needs_data
@needs_spacy
@pytest.mark.timeout(120)
def test_known_leak_of_gsm8k_by_ngrams():
    queries = real_benchmark("gsm8k_test.jsonl.gz", "question").queries
    assert num_found("math_cot.json.gz", {"question": "instruction"}, queries, mode="ngram") == 1055
    assert num_found("gsm8k_train.jsonl.gz", {}, queries, mode="ngram") == 2


@needs_data
def test_agieval_leaves_out_null_passages_and_keeps_empty_ones():
    queries = real_benchmark("agieval_en.jsonl.gz", "passage", "question").queries
    used = [query for query in queries if query is not None]
    assert (len(queries), len(used)) == (3546, 2086)
    assert sum(FullMatcher(used).unmatchable) == 206


@needs_data
@needs_spacy
@pytest.mark.parametrize(
    ("name", "field", "num_short"),
    [("truthfulqa.jsonl.gz", "Question", 125), ("math_test.jsonl.gz", "problem", 217)],
)
def test_ngram_mode_is_blind_to_short_items(name, field, num_short):
    tokenize = spacy_tokenizer()
    queries = real_benchmark(name, field).queries
    assert sum(len(tokenize(query[0])) < 8 for query in queries) == num_short


def test_a_leak_is_said_in_the_log(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="smoltulu"):
        run(tmp_path, benchmark(tmp_path), fail_above=0.0)
    assert "of its" in caplog.text and "are in these training rows" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="smoltulu"):
        run(tmp_path, benchmark(tmp_path), fail_above=1.0)
    assert caplog.text == ""
