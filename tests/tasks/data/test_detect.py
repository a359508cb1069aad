"""Every form that a format reads is told from its columns, and what is told reads the rows."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data.detect import SAMPLE_ROWS, detect_format, format_as_given, sample_rows
from smoltulu.tasks.data.formats import FORMS, SourceCounts

HH = "\n\nHuman: q\n\nAssistant: a"
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

#: Rows as well-known data sets have them: a row, the form, its fields, and what of it no field reads.
KNOWN: list[tuple[dict[str, Any], str, dict[str, str], set[str]]] = [
    # ShareGPT, SlimOrca; Capybara-like; UltraChat
    ({"conversations": SHAREGPT, "id": "1"}, "messages", {"messages": "conversations"}, {"id"}),
    ({"system": "s", "conversations": SHAREGPT}, "messages", {"messages": "conversations"}, set()),
    ({"messages": json.dumps(CHAT)}, "messages", {}, set()),
    ({"prompt": "q", "prompt_id": "1", "messages": CHAT}, "messages", {}, {"prompt", "prompt_id"}),
    (
        {
            "messages": [
                CHAT[0],
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            ],
            "tools": [{"name": "f"}],
        },
        "messages",
        {},
        set(),
    ),
    # Gemini
    (
        {"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
        "messages",
        {"messages": "contents"},
        set(),
    ),
    # Dolly; Alpaca; OpenOrca; SQuAD-like
    (
        {"instruction": "q", "context": "c", "response": "a", "category": "x"},
        "instruction",
        {"input": "context", "output": "response"},
        {"category"},
    ),
    ({"instruction": "q", "input": "", "output": "a", "history": [["q", "a"]]}, "instruction", {}, set()),
    # LLaMA-Factory's pairs
    (
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "b"}},
        "preference",
        {"prompt": "conversations"},
        set(),
    ),
    # LLM-Adapters' mathematics
    ({"instruction": "q", "input": "", "output": "a", "answer": "7"}, "instruction", {}, {"answer"}),
    (
        {"id": "1", "system_prompt": "s", "question": "q", "response": "a"},
        "question_answer",
        {"answer": "response"},
        {"id"},
    ),
    (
        {"question": "q", "context": "c", "answer": "a"},
        "instruction",
        {"instruction": "question", "input": "context", "output": "answer"},
        set(),
    ),
    # MATH, NuminaMath: the solution is the answer
    (
        {"problem": "q", "solution": "a", "answer": "7", "level": "5"},
        "question_answer",
        {"question": "problem", "answer": "solution"},
        {"answer", "level"},
    ),
    ({"question": "q", "answer": "7", "solution": "a"}, "question_answer", {"answer": "solution"}, {"answer"}),
    # xLAM
    (
        {"query": "q", "answers": '[{"name": "f", "arguments": {"a": 1}}]', "tools": '[{"name": "f"}]', "id": 1},
        "function_calls",
        {},
        {"id"},
    ),
    # transcripts
    ({"text": "### Human: q### Assistant: a"}, "transcript", {}, set()),
    ({"text": HH}, "transcript", {}, set()),
    ({"chosen": HH, "rejected": HH + "!"}, "preference", {}, set()),
    # orca-dpo, UltraFeedback binarized and raw, HelpSteer2, KTO
    ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, "preference", {"prompt": "question"}, set()),
    (
        {
            "prompt": "q",
            "prompt_id": "1",
            "chosen": CHAT,
            "rejected": [CHAT[0], {"role": "assistant", "content": "b"}],
            "messages": CHAT,
            "score_chosen": 5.0,
            "score_rejected": 4.0,
        },
        "preference",
        {},
        {"messages", "prompt_id"},
    ),
    (
        {
            "instruction": "q",
            "models": ["m"],
            "completions": [
                {"response": "a", "overall_score": 2, "model": "m"},
                {"response": "b", "overall_score": 1, "model": "n"},
            ],
        },
        "preference_by_score",
        {"prompt": "instruction"},
        {"models", "completions[].model"},
    ),
    (
        {
            "split": "train",
            "prompt": "q",
            "response_1": "a",
            "response_2": "b",
            "preference_strength": -2,
            "preference_statement": "x",
        },
        "preference_by_strength",
        {},
        {"split", "preference_statement"},
    ),
    ({"input": "q", "output_1": "a", "output_2": "b", "label": 1}, "preference_by_label", {}, set()),
    ({"prompt": "q", "completion": "a", "label": True}, "kto", {}, set()),
    ({"prompt": CHAT[:1], "completion": CHAT[1:], "label": False}, "kto", {}, set()),
    # classes are no judgements of answers
    ({"prompt": "q", "completion": "a", "label": 3}, "prompt_completion", {}, {"label"}),
    ({"text": "t", "label": 0}, "prompt_completion", {"prompt": "text", "completion": "text"}, {"label"}),
    (
        {"messages": CHAT[:1], "ground_truth": "7", "dataset": "gsm8k"},
        "prompt_completion",
        {"prompt": "messages", "completion": "ground_truth"},
        {"dataset"},
    ),
]


@pytest.mark.parametrize(("row", "form", "fields", "unread"), KNOWN)
def test_rows_of_well_known_sets_are_told_and_read(
    row: dict[str, Any], form: str, fields: dict[str, str], unread: set[str]
) -> None:
    found = detect_format([row])
    assert (found.format, dict(found.fields)) == (form, fields)
    assert found.kind == FORMS[form].kind and all(column in found.said for column in fields.values())
    counts = SourceCounts(DataSource(path="x", format=found.format, fields=dict(found.fields)))
    made = list(counts.normalised([row]))
    assert counts.report().reasons == {} and len(made) == (form != "kto")
    assert set(counts.report().unread) == unread


def test_every_form_but_those_of_benchmarks_is_told() -> None:
    assert {form for _, form, _, _ in KNOWN} | {"rlvr", "text", "all_text"} == set(FORMS)
    for name, form in FORMS.items():
        if form.fields and form.kind is not None:
            assert format_as_given(name, {form.fields[0]: "x"}).kind == form.kind  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "score": 1}, "The nearest is preference: it lacks prompt, rejected"),
        (
            {"topic": "q", "response_1": "a", "response_2": "b"},
            "preference_by_strength: it lacks prompt, preference_strength",
        ),
        ({"a": 1, "completions": []}, "preference_by_score: it lacks prompt"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown roles: 'narrator'"),
        ({"messages": CHAT[:1]}, "prompts alone are read with a ground_truth, or as format rlvr"),
        ({"messages": "hello"}, "'messages' is no list of turns"),
        ({"chosen": "[INST] q [/INST] a", "rejected": "[INST] q [/INST] b"}, r"transcripts in one string \(Llama 2's"),
        ({"system": "SYSTEM: s", "chat": "USER: q\n\n\nASSISTANT: <functioncall> {}"}, "'chat' holds .*Glaive"),
    ],
)
def test_what_is_missing_is_said(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detect_format([row])


def test_a_named_format_has_the_same_fields() -> None:
    with pytest.raises(ValueError, match="has no field answer; its fields are prompt, completion, label"):
        format_as_given("kto", {"answer": "x"})


def test_the_sample_is_bounded_by_text_and_takes_no_more() -> None:
    taken = []

    def rows() -> Any:
        for number in itertools.count():
            taken.append(number)
            yield {"messages": [{"role": "user", "content": "x" * (1 << 20)}, CHAT[1]]}

    assert detect_format(rows()).format == "messages"
    assert len(taken) == 16
    assert len(sample_rows({"text": "x"} for _ in itertools.count())) == SAMPLE_ROWS
    assert len(sample_rows([{"text": "x" * (64 << 20)}] * 3)) == 1
