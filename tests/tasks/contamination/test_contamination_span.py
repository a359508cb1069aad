"""Policy `span`, and the rule by which short items count: by hand, through the stage."""

from __future__ import annotations

from itertools import pairwise

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.schemas.contamination import ContaminationRules
from smoltulu.tasks.contamination.span import _merged
from tests.rows_file import read_rows
from tests.tasks.contamination.contamination_fuzz import conversation
from tests.tasks.contamination.test_contamination import LEAK, benchmark, lines, run
from tests.tasks.contamination.test_contamination_engine import needs_spacy

QUIZ = [{"q": LEAK}, {"q": "Is fire hot?"}, {"q": "water"}]


def quiz(tmp_path):
    return benchmark(tmp_path, rows=QUIZ, query_fields=["q"], strip_prefix="")


def turn(row_id, *texts):
    return conversation(row_id, *texts)


def kept_and_log(tmp_path):
    return read_rows(tmp_path / "folder" / "rows.parquet"), lines(tmp_path / "folder" / "removed.jsonl")


# Spans.


def test_span_cuts_every_copy_and_keeps_every_other_value(tmp_path):
    rows = [
        turn("0:0", "hello", LEAK),  # in a turn of the assistant: not looked at
        turn("0:1", f"One. {LEAK} Two. {LEAK.upper()}", "yes", f"\u00e9 {LEAK}\u2026", "no"),
        turn("0:2", "clean", "yes"),
        turn("0:3", f" {LEAK}\n", "yes"),  # the question mark that is left is no word
        turn("0:4", "clean", "yes"),
    ]
    outputs, metrics = run(tmp_path, quiz(tmp_path), rows=rows, policy="span", min_terms=8)
    kept, log = kept_and_log(tmp_path)
    assert [row["id"] for row in kept] == ["0:0", "0:1", "0:2", "0:4"]
    assert [kept[0], *kept[2:]] == [rows[0], rows[2], rows[4]]
    assert [message["content"] for message in kept[1]["messages"]] == ["One. ? Two. ?", "yes", "\u00e9 ?\u2026", "no"]
    assert [message["role"] for message in kept[1]["messages"]] == ["user", "assistant"] * 2
    reasons = {"quiz": [0]}
    assert log[0]["action"] == "cut" and log[0]["reasons"] == reasons
    assert log[0]["cut"][0] == {"turn": 0, "begin": 5, "text": LEAK[:-1]}
    assert {cut["turn"] for cut in log[0]["cut"]} == {0, 2} and len(log[0]["cut"]) == 3
    assert log[-1] == {
        "id": "0:3", "reasons": reasons, "action": "removed", "why": "turn 0 is left without a word",
        "cut": [{"turn": 0, "begin": 1, "text": LEAK[:-1]}],
    }  # fmt: skip
    assert (outputs.num_rows, outputs.num_removed, outputs.num_cut) == (4, 1, 1)
    assert metrics["num_cut"] == 1.0
    # what is kept has no hit that counts
    again, _ = run(tmp_path, quiz(tmp_path), rows=kept, policy="remove", min_terms=8)
    assert again.num_removed == 0


def test_span_takes_a_margin_up_to_whole_words(tmp_path):
    rows = [turn("0:0", f"Before all, question: {LEAK} And then more.", "yes")]
    run(tmp_path, quiz(tmp_path), rows=rows, policy="span", min_terms=8, span_margin=3)
    kept, _ = kept_and_log(tmp_path)
    assert kept[0]["messages"][0]["content"] == "Before all,  then more."


def test_span_removes_a_preference_row_of_two_equal_completions(tmp_path):
    prompt = [{"role": "user", "content": "Go on."}]
    rows = [
        {
            "id": f"0:{number}",
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": f"{chosen}A {LEAK}"}],
            "rejected": [{"role": "assistant", "content": f"A {LEAK.lower()}"}],
        }
        for number, chosen in enumerate(["", "B"])
    ]
    run(tmp_path, quiz(tmp_path), rows=rows, kind="preference", policy="span", min_terms=8, roles=("assistant",))
    kept, log = kept_and_log(tmp_path)
    assert [row["chosen"][0]["content"] for row in kept] == ["BA ?"]
    assert kept[0]["prompt"] == prompt and log[0]["why"] == "chosen and rejected are left the same"
    assert [cut["turn"] for cut in log[1]["cut"]] == [1, 2]


def test_span_in_normalised_mode_cuts_the_source(tmp_path):
    rows = [turn("0:0", "Now: **How many** apples&nbsp;does <b>Ann</b> have\u200b after lunch today? Well.", "yes")]
    run(tmp_path, quiz(tmp_path), rows=rows, policy="span", min_terms=8, mode="normalised")
    kept, log = kept_and_log(tmp_path)
    assert kept[0]["messages"][0]["content"] == "Now: **? Well."
    assert log[0]["cut"][0]["text"].startswith("How many** apples&nbsp;does")


def test_span_margin_without_span_is_refused():
    with pytest.raises(ValueError, match="only policy span cuts"):
        ContaminationRules(span_margin=3)


@given(st.text(max_size=40), st.data(), st.integers(0, 5))
def test_bounds_are_merged_and_lie_in_the_text(text, data, margin):
    text = text.encode("utf-8", "replace").decode()
    ends = [len(text[:at].encode()) for at in range(len(text) + 1)]
    bounds = data.draw(st.lists(st.tuples(st.sampled_from(ends), st.sampled_from(ends)).map(sorted), max_size=4))
    merged = _merged(text, [tuple(pair) for pair in bounds], margin)
    assert all(0 <= first <= last <= len(text) for first, last in merged)
    assert all(before[1] < after[0] for before, after in pairwise(merged))
    covered = {at for first, last in merged for at in range(first, last)}
    assert covered >= {at for begin, end in bounds for at in range(ends.index(begin), ends.index(end))}


# Short items.

SHORT = [
    turn("0:0", "Is fire hot?", "yes"),  # most of the turn
    turn("0:1", "Please answer some questions that I have:\n- Is fire hot?\n- and many more of them", "yes"),
    turn("0:2", "I wonder why she asked me: is fire hot, as everybody knows by now", "no"),
    turn("0:3", "water under a bridge, and then\n\n2. Water\n", "no"),
    turn("0:4", "more water under a bridge\nwater works", "no"),
    turn("0:5", f"{LEAK}", "no"),
]


@pytest.mark.parametrize("mode", ["full", "normalised"])
def test_quotes_and_returns_are_no_letters_of_a_line(tmp_path, mode):
    rows = [
        turn(
            "0:0",
            "Please answer this one\u2026\r\u300c\u300c\u2014 Is fire hot? \u2014\u300d\u300d\rand think twice",
            "yes",
        ),
        turn("0:1", "\u8bf7\u95ee\u4f60\u4eec\u4f1a\u600e\u4e48\u8bf4\u8fd9\u4e00\u53e5: Is fire hot?", "yes"),
    ]
    run(tmp_path, quiz(tmp_path), rows=rows, mode=mode, min_terms=8, short_items="alone")
    assert [line["id"] for line in kept_and_log(tmp_path)[1]] == ["0:0"]


@pytest.mark.parametrize("mode", ["full", "normalised"])
@pytest.mark.parametrize(
    ("rule", "removed"),
    [("never", ["0:5"]), ("alone", ["0:0", "0:1", "0:3", "0:5"]), ("always", [f"0:{k}" for k in range(6)])],
)
def test_short_items_count_by_how_they_stand(tmp_path, mode, rule, removed):
    rows = [*SHORT, turn("0:6", "clean", "yes")]
    outputs, _ = run(tmp_path, quiz(tmp_path), rows=rows, mode=mode, min_terms=8, short_items=rule)
    assert [line["id"] for line in kept_and_log(tmp_path)[1]] == removed
    assert outputs.num_rows_contaminated == 6  # all are reported
    hits = pq.read_table(tmp_path / "folder" / "hits.parquet")
    assert ("is_alone" in hits.schema.names) == (rule == "alone")


@needs_spacy
@pytest.mark.parametrize(("rule", "found"), [("never", [5]), ("alone", [0, 1, 3, 5]), ("always", [0, 1, 2, 3, 4, 5])])
def test_short_items_are_found_in_ngram_mode_where_asked_for(tmp_path, rule, found):
    rows = [*SHORT, turn("0:6", "clean", "yes")]
    outputs, _ = run(tmp_path, quiz(tmp_path), rows=rows, mode="ngram", short_items=rule)
    hits = pq.read_table(tmp_path / "folder" / "hits.parquet").to_pylist()
    assert sorted({hit["row"] for hit in hits}) == found
    [report] = outputs.benchmarks
    assert report.num_contaminated == (1 if rule == "never" else 3)
    assert report.num_unmatchable == (2 if rule == "never" else 0)
    expected = 1.0 if rule != "never" else 1 / 3
    assert report.mean_score == pytest.approx(expected)


def test_span_cuts_short_items_that_stand_alone(tmp_path):
    rows = [SHORT[1], SHORT[2]]
    run(tmp_path, quiz(tmp_path), rows=rows, policy="span", min_terms=8, short_items="alone")
    kept, _ = kept_and_log(tmp_path)
    assert kept[0]["messages"][0]["content"].split("\n")[1] == "- ?"
    assert kept[1] == SHORT[2]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b c", LEAK, "Is fire hot?", "water", "\n", "x" * 30]), max_size=6),
        min_size=1,
        max_size=6,
    )
)
def test_what_a_span_leaves_has_no_hit(tmp_path_factory, texts):
    tmp_path = tmp_path_factory.mktemp("span")
    rows = [turn(f"0:{k}", " ".join(["hello", *parts]), "yes") for k, parts in enumerate(texts)]
    rules = {"min_terms": 8, "short_items": "alone"}
    run(tmp_path, quiz(tmp_path), rows=rows, policy="span", **rules)
    kept, log = kept_and_log(tmp_path)
    touched = {line["id"] for line in log}
    before = {row["id"]: row for row in rows}
    assert all(row == before[row["id"]] for row in kept if row["id"] not in touched)
    assert {row["id"] for row in kept} == before.keys() - {line["id"] for line in log if line["action"] == "removed"}
    again, _ = run(tmp_path, quiz(tmp_path), rows=kept, policy="report", **rules)
    _, counted = run(tmp_path, quiz(tmp_path), rows=[*kept, turn("x", "clean", "y")], policy="remove", **rules)
    assert counted["num_removed"] == 0.0 and again.num_rows == len(kept)


@pytest.mark.parametrize("mode", ["full", "normalised"])
def test_span_cuts_every_field_of_an_item(tmp_path, mode):
    # "violet" is in fewer items than the question is, so the hit is found by it: the question has to go, too.
    question = "Which colour has the sky above the old town in the evening"
    items = [{"q": question, "a": "violet"}, {"q": question, "a": "green"}]
    bench = benchmark(tmp_path, rows=items, query_fields=["q", "a"], strip_prefix="")
    rows = [turn("0:0", f"One. {question}? It is: VIOLET. Two.", "yes"), turn("0:1", f"{question}? violets", "yes")]
    run(tmp_path, bench, rows=rows, policy="span", mode=mode)
    kept, log = kept_and_log(tmp_path)
    assert kept[0]["messages"][0]["content"] == "One. ? It is: . Two."
    assert sorted(cut["text"] for cut in log[0]["cut"]) == ["VIOLET", question]
    assert kept[1] == rows[1] and len(log) == 1
