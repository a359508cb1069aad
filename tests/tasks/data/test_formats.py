"""Rows of every form, by hand; every reason for which a row is dropped; and the `dataset` stage around them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DataSet, DatasetInputs, DatasetStageConfig, DataSource
from smoltulu.tasks.data.formats import FORMAT_FIELDS, MalformedRow, adapt, check_source
from smoltulu.tasks.data.stage import build_dataset
from smoltulu.tasks.stage import StageContext
from tests.rows_file import read_rows


def source(format: str, fields: dict | None = None, **rest) -> DataSource:
    return DataSource(path="unused.jsonl", format=format, fields=fields or {}, **rest)


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


Q, A, B = user("q"), assistant("a"), assistant("b")
SFT = {"messages": [Q, A]}
PAIR = {"prompt": [Q], "chosen": [A], "rejected": [B]}
GSM8K = {"prompt": [Q], "verifier": "gsm8k", "ground_truth": "7"}


@pytest.mark.parametrize(
    ("row", "given", "expected"),
    [
        ({"messages": [{**Q, "id": 3}, A], "source": "x"}, source("messages"), SFT),
        ({"messages": [system(" "), Q, A]}, source("messages"), SFT),  # an empty system turn is no system turn
        (
            {"conversation": [system("s"), Q, A, user("q2"), B]},
            source("messages", {"messages": "conversation"}),
            {"messages": [system("s"), Q, A, user("q2"), B]},
        ),
        ({"prompt": "q", "response": "a"}, source("prompt_completion", {"completion": "response"}), SFT),
        ({"prompt": [Q], "completion": [A]}, source("prompt_completion"), SFT),
        ({"instruction": "q", "input": "", "output": "a"}, source("instruction"), SFT),
        ({"instruction": "q", "output": "a"}, source("instruction"), SFT),
        (
            {"instruction": "q", "input": "i", "response": "\na "},
            source("instruction", {"output": "response"}),
            {"messages": [user("q\n\ni"), assistant("\na ")]},  # text is kept as it is
        ),
        ({"question": "q", "answer": "a"}, source("question_answer"), SFT),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, source("preference"), PAIR),
        ({"prompt": [Q], "chosen": [A], "rejected": [B]}, source("preference"), PAIR),
        ({"prompt": "q", "chosen": [A], "rejected": [B]}, source("preference"), PAIR),
        ({"chosen": [Q, A], "rejected": [Q, B]}, source("preference"), PAIR),
        # Tulu 3's preference mixture: a string prompt beside whole conversations, here only the last question
        (
            {"prompt": "q2", "chosen": [Q, A, user("q2"), A], "rejected": [Q, A, user("q2"), B]},
            source("preference"),
            {"prompt": [Q, A, user("q2")], "chosen": [A], "rejected": [B]},
        ),
        # they part at a user turn: the prompt goes back to the last user turn that both have
        (
            {"chosen": [Q, A, user("x"), A], "rejected": [Q, A, user("y"), A]},
            source("preference"),
            {"prompt": [Q], "chosen": [A, user("x"), A], "rejected": [A, user("y"), A]},
        ),
        ({"input": "q", "output_1": "a", "output_2": "b", "label": 1}, source("preference_by_label"), PAIR),
        ({"input": "q", "output_1": "b", "output_2": "a", "label": "2"}, source("preference_by_label"), PAIR),
        ({"messages": [Q], "verifier": "GSM8K", "ground_truth": "7"}, source("rlvr"), GSM8K),
        ({"prompt": "q", "verifier": "gsm8k", "ground_truth": 7}, source("rlvr"), GSM8K),
        (
            {"question": "q", "answer": "6 + 1 = 7\n#### 7"},
            source("rlvr", {"prompt": "question", "ground_truth": "answer"}, verifier="gsm8k"),
            {**GSM8K, "ground_truth": "6 + 1 = 7\n#### 7"},
        ),
        # Tulu 3's RLVR mixture names the verifier in `dataset`, in capitals
        (
            {"messages": [Q], "dataset": "MATH", "ground_truth": "x+1"},
            source("rlvr", {"verifier": "dataset"}),
            {"prompt": [Q], "verifier": "math", "ground_truth": "x+1"},
        ),
        (
            {"prompt": "q", "verifier": "constraint", "ground_truth": {"kind": "word_count", "count": 3}},
            source("rlvr"),
            {"prompt": [Q], "verifier": "constraint", "ground_truth": '{"kind": "word_count", "count": 3}'},
        ),
        # a source says which verifier a name in its rows means
        (
            {"prompt": "q", "verifier": "GSM8K", "ground_truth": "7"},
            source("rlvr", verifiers={"gsm8k": "gsm8k_strict"}),
            {**GSM8K, "verifier": "gsm8k_strict"},
        ),
        (
            {"prompt": "q", "verifier": "math", "ground_truth": "7"},
            source("rlvr", verifiers={"Math": "math@paper"}),
            {"prompt": [Q], "verifier": "math@paper", "ground_truth": "7"},
        ),
        # any of a list is right; [7, 8] as text would be an interval
        (
            {"prompt": "q", "verifier": "math", "ground_truth": [7, "x+1"]},
            source("rlvr"),
            {"prompt": [Q], "verifier": "math", "ground_truth": '["7", "x+1"]'},
        ),
        (
            {"prompt": "q", "verifier": "ifeval", "ground_truth": {"func_name": "validate_title", "N": None}},
            source("rlvr"),
            {"prompt": [Q], "verifier": "ifeval", "ground_truth": '{"func_name": "validate_title", "N": null}'},
        ),
        # the row's verifier goes before the source's
        (
            {"prompt": "q", "verifier": "math", "ground_truth": "7"},
            source("rlvr", verifier="gsm8k"),
            {"prompt": [Q], "verifier": "math", "ground_truth": "7"},
        ),
        ({"text": "t", "other": 1}, source("text"), {"text": "t"}),
    ],
)
def test_normalised(row, given, expected):
    before = json.dumps(row)
    assert adapt(row, given) == expected
    assert json.dumps(row) == before


@pytest.mark.parametrize(
    ("row", "given", "reason"),
    [
        ([1], source("text"), "row is not an object"),
        ({}, source("text"), "field 'text' is missing"),
        ({"text": None}, source("text"), "field 'text' is null"),
        ({}, source("text", {"text": "body"}), r"field 'text' \(column 'body'\) is missing"),
        ({"text": 3}, source("text"), "field 'text' is a number, not text"),
        ({"text": " \n"}, source("text"), "field 'text' is empty"),
        ({"text": "a\0b"}, source("text"), "NUL character in text"),
        ({"text": "a\ud800b"}, source("text"), "lone surrogate in text"),
        ({"messages": "hello"}, source("messages"), "is text, not a list of messages"),
        ({"messages": []}, source("messages"), "no turns"),
        ({"messages": [{"role": "user"}, A]}, source("messages"), "not an object with role and content"),
        ({"messages": [Q, {"role": "tool", "content": "x"}]}, source("messages"), "roles out of order"),
        ({"messages": [Q, {"role": "narrator", "content": "x"}]}, source("messages"), "unknown role"),
        ({"messages": [Q, {"role": ["user"], "content": "x"}]}, source("messages"), "unknown role"),
        ({"messages": [Q, assistant(None)]}, source("messages"), "content of a turn of messages is not text"),
        ({"messages": [Q, assistant(" ")]}, source("messages"), "empty assistant turn"),
        ({"messages": [user(""), A]}, source("messages"), "empty user turn"),
        ({"messages": [user("a\0"), A]}, source("messages"), "NUL character"),
        ({"messages": [Q]}, source("messages"), "does not end with the assistant's turn"),
        ({"messages": [A]}, source("messages"), "roles out of order"),
        ({"messages": [Q, Q, A]}, source("messages"), "roles out of order"),
        ({"messages": [Q, system("s"), A]}, source("messages"), "roles out of order"),
        ({"messages": [system("s"), system("s"), Q, A]}, source("messages"), "roles out of order"),
        ({"messages": [system("s")]}, source("messages"), "no user turn"),
        ({"prompt": "q", "completion": ""}, source("prompt_completion"), "field 'completion' is empty"),
        ({"prompt": 3, "completion": "a"}, source("prompt_completion"), "neither text nor a list"),
        ({"instruction": "q", "input": ["i"], "output": "a"}, source("instruction"), "field 'input' is a list"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, source("preference"), "chosen equals rejected"),
        ({"chosen": [Q, A], "rejected": [Q, A]}, source("preference"), "chosen equals rejected"),
        ({"chosen": [Q, A], "rejected": [user("z"), A]}, source("preference"), "share no prompt"),
        ({"chosen": "a", "rejected": "b"}, source("preference"), "field 'prompt' is missing"),
        ({"prompt": "q", "chosen": "a", "rejected": [B]}, source("preference"), "different types"),
        ({"prompt": [Q, A], "chosen": "a", "rejected": "b"}, source("preference"), "prompt does not end with"),
        ({"input": "q", "output_1": "a", "output_2": "b", "label": 0}, source("preference_by_label"), "neither 1 nor"),
        ({"input": "q", "output_1": "a", "output_2": "b", "label": True}, source("preference_by_label"), "neither 1"),
        ({"input": "q", "output_1": "a", "output_2": "a", "label": 1}, source("preference_by_label"), "equals"),
        ({"verifier": "gsm8k", "ground_truth": "1"}, source("rlvr"), "no messages, prompt or question"),
        ({"prompt": [Q, A], "verifier": "gsm8k", "ground_truth": "1"}, source("rlvr"), "does not end with the user's"),
        ({"prompt": "q", "ground_truth": "1"}, source("rlvr"), "no verifier"),
        ({"prompt": "q", "verifier": "ifevl", "ground_truth": "1"}, source("rlvr"), "unknown verifier 'ifevl'"),
        (
            {"prompt": "q", "verifier": "ifeval", "ground_truth": {"func_name": "validate_titel"}},
            source("rlvr"),
            r"ifeval cannot grade: unknown func_name 'validate_titel' \(did you mean 'validate_title'\?\)",
        ),
        ({"prompt": "q", "verifier": "math", "ground_truth": []}, source("rlvr"), "list of right answers is empty"),
        ({"prompt": "q", "verifier": "math", "ground_truth": [None]}, source("rlvr"), "holds what is neither text"),
        ({"prompt": "q", "verifier": "gsm8k"}, source("rlvr"), "no ground truth"),
        ({"prompt": "q", "verifier": "gsm8k", "ground_truth": ""}, source("rlvr"), "no ground truth"),
        ({"prompt": "q", "verifier": "gsm8k", "ground_truth": "many"}, source("rlvr"), "gsm8k cannot grade"),
        ({"prompt": "q", "verifier": "math", "ground_truth": float("nan")}, source("rlvr"), "without a JSON form"),
    ],
)
def test_malformed(row, given, reason):
    with pytest.raises(MalformedRow, match=reason):
        adapt(row, given)


def test_sources_that_cannot_fit_are_refused_before_reading():
    check_source(source("preference"), "preference")
    with pytest.raises(ValueError, match="gives no sft rows; allowed are messages"):
        check_source(source("rlvr"), "sft")
    with pytest.raises(ValueError, match="has no field respone"):
        check_source(source("prompt_completion", {"respone": "completion"}), "sft")
    unknown = r"'unused.jsonl': unknown verifier 'gsm' \(did you mean 'gsm8k'\?\); known are gsm8k, gsm8k_strict, math"
    with pytest.raises(ValueError, match=unknown):
        check_source(source("rlvr", verifier="gsm"), "rlvr")
    with pytest.raises(ValueError, match=unknown):
        check_source(source("rlvr", verifiers={"gsm8k": "gsm"}), "rlvr")
    with pytest.raises(ValueError, match="'math' has no version 'tulu'; there is math@fixed, math@paper"):
        check_source(source("rlvr", verifier="math@tulu"), "rlvr")
    with pytest.raises(ValueError, match="names one twice"):
        check_source(source("rlvr", verifiers={"MATH": "math", "math": "math@paper"}), "rlvr")
    with pytest.raises(ValueError, match="gives sft rows, which no verifier grades"):
        check_source(source("messages", verifier="gsm8k"), "sft")
    check_source(source("rlvr", verifier="math@paper", verifiers={"gsm8k": "GSM8K_strict"}), "rlvr")


# Rows that look like data often enough to get past the first checks, with anything JSON can hold in between.
_text = st.one_of(st.sampled_from(["", " ", "a", "7", "#### 7", "gsm8k", "math", "\0", "\ud800"]), st.text(max_size=5))
_turn = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": _text})
_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _text, _turn, st.lists(_turn, max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_text, inner, max_size=3)),
    max_leaves=6,
)
_NAMES = sorted({name for names in FORMAT_FIELDS.values() for name in names})
_rows = st.one_of(_json, st.dictionaries(st.sampled_from(_NAMES), _json, max_size=8))


def _check_turns(turns, last):
    assert all(set(turn) == {"role", "content"} and turn["content"].strip() for turn in turns)
    spoken = turns[1:] if turns[0]["role"] == "system" else turns
    assert [turn["role"] for turn in spoken] == (["user", "assistant"] * len(spoken))[: len(spoken)]
    assert spoken and spoken[-1]["role"] == last


@settings(max_examples=400, deadline=None)
@given(row=_rows, format=st.sampled_from(sorted(FORMAT_FIELDS.keys() - {"kto", "all_text"})))
def test_any_row_is_normalised_or_malformed(row, format):
    try:
        result = adapt(row, source(format))
    except MalformedRow:
        return
    json.dumps(result, ensure_ascii=False).encode("utf-8")  # no lone surrogate got through
    if format == "text":
        assert set(result) == {"text"}
    elif format == "rlvr":
        assert set(result) == {"prompt", "verifier", "ground_truth"}
        _check_turns(result["prompt"], "user")
    elif format.startswith("preference"):
        assert set(result) == {"prompt", "chosen", "rejected"} and result["chosen"] != result["rejected"]
        _check_turns(result["prompt"], "user")
        _check_turns(result["prompt"] + result["chosen"], "assistant")
        _check_turns(result["prompt"] + result["rejected"], "assistant")
    else:
        assert set(result) == {"messages"}
        _check_turns(result["messages"], "assistant")


_clean = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@given(texts=st.lists(_clean, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_well_formed_conversations_are_never_dropped_or_changed(texts):
    messages = [(user, assistant)[index % 2](text) for index, text in enumerate(texts)]
    assert adapt({"messages": messages}, source("messages")) == {"messages": messages}


# The stage.


def run(tmp_path, sources, kind="sft", **rest):
    for name in ("folder", "work"):
        (tmp_path / name).mkdir(exist_ok=True)
    reported = []
    context = StageContext(
        tmp_path / "folder", tmp_path / "work", ComputeSettings(), lambda *a, **m: reported.append((*a, m))
    )
    config = DatasetStageConfig(kind=kind, data=DataSet(sources=tuple(sources), **rest))
    return *build_dataset(config, DatasetInputs(), context), reported


def file(tmp_path, name, rows, format="question_answer", **rest):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path=str(tmp_path / name), format=format, **rest)


def test_stage_writes_rows_with_stable_ids_and_counts_the_rest(tmp_path):
    good = {"question": "q\u00e9", "answer": "a"}
    bad = {"question": "q", "answer": " "}
    first = file(tmp_path, "one.jsonl", [good, bad, 3, good, *[bad] * 5])
    second = file(tmp_path, "two.jsonl", [{"prompt": "p", "completion": "c"}], "prompt_completion")
    outputs, metrics, reported = run(tmp_path, [first, second], max_malformed_share=0.9)
    rows = read_rows(tmp_path / "folder" / outputs.file)
    assert [row["id"] for row in rows] == ["0:0", "0:3", "1:0"]
    assert rows[0]["messages"] == [user("q\u00e9"), A]
    assert metrics == {"num_rows": 3.0, "num_malformed": 7.0}
    one, two = outputs.sources
    assert (one.label, one.num_rows, one.num_malformed) == ("one.jsonl", 9, 7)
    assert one.reasons == {"field 'answer' is empty": 6, "row is not an object": 1}
    assert len(one.examples) == 5 and one.examples[1] == "row 2: row is not an object: 3"
    assert (two.num_rows, two.num_malformed, two.reasons) == (1, 0, {})
    assert reported[-1][:2] == (2, 2)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["rows.parquet"]


def test_stage_fails_per_source_and_leaves_nothing(tmp_path):
    good, bad = {"question": "q", "answer": "a"}, {"question": "q", "answer": "", "note": "x" * 500}
    large = file(tmp_path, "large.jsonl", [good] * 1000)
    small = file(tmp_path, "small.jsonl", [good, bad])  # 1 of 1,002 overall, but half of this source
    with pytest.raises(ValueError) as error:
        run(tmp_path, [large, small], max_malformed_share=0.01)
    message = str(error.value)
    assert "small.jsonl: 1 of 2 rows are malformed (50.00%), allowed are 1.00%" in message
    assert "field 'answer' is empty: 1" in message and "row 1:" in message and "x" * 300 not in message
    assert "large.jsonl" not in message
    assert list((tmp_path / "folder").iterdir()) == []
    run(tmp_path, [large, small], max_malformed_share=0.5)  # the threshold itself is allowed


def test_stage_refuses_sources_without_rows(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no rows at all"):
        run(tmp_path, [file(tmp_path, "none.jsonl", [])])
    with pytest.raises(ValueError, match="no row is left"):
        run(tmp_path, [file(tmp_path, "bad.jsonl", [3])], max_malformed_share=1.0)
    assert list((tmp_path / "folder").iterdir()) == []


def test_stage_says_what_is_not_in_the_rows(tmp_path, caplog):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2, "id": 1},
        {"prompt": "q", "chosen": "a", "rejected": "a", "images": ["x"]},
        {"prompt": "q", "chosen": "a", "rejected": "c", "images": ["x"]},
    ]
    given = file(tmp_path, "pairs.jsonl", rows, "preference", ties="drop", ignore=["images", "image"])
    with caplog.at_level("INFO", logger="smoltulu"):
        outputs, metrics, _ = run(tmp_path, [given], "preference")
    (report,) = outputs.sources
    assert (outputs.num_rows, metrics["num_malformed"], report.num_dropped) == (2, 0.0, 1)
    assert report.ignored == {"images": 1, "image": 0} and report.unread == {"id": 1}
    said = [record.getMessage() for record in caplog.records]
    assert "pairs.jsonl: dropped: chosen equals rejected: 1 rows" in said
    assert "pairs.jsonl: noticed: rejected is scored above chosen: 1 rows" in said
    assert "pairs.jsonl: ignore names 'image', which no row has" in said
    assert "pairs.jsonl: no field reads: id" in said


def test_stage_pairs_labelled_rows_and_says_why_none_is_left(tmp_path):
    rows = [{"prompt": "q", "completion": text, "label": label} for text, label in (("a", True), ("b", False))]
    outputs, _, _ = run(tmp_path, [file(tmp_path, "kto.jsonl", rows, "kto")], "preference")
    assert read_rows(tmp_path / "folder" / outputs.file) == [{"id": "0:1", **PAIR}] and outputs.num_rows == 1
    (tmp_path / "folder" / outputs.file).unlink()
    with pytest.raises(
        ValueError, match=r"no row is left.*one.jsonl: label is true, and no row with label false.*: 1 rows"
    ):
        run(tmp_path, [file(tmp_path, "one.jsonl", rows[:1], "kto")], "preference")
