"""Rows as people have them, by hand: spellings of turns, transcripts, columns that change what a row means, pairs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from smoltulu.schemas.common import scientific
from smoltulu.schemas.data import DataSource, SourceReport
from smoltulu.tasks.data.files import read_file
from smoltulu.tasks.data.formats import KIND_FORMATS, DroppedRow, MalformedRow, SourceCounts, adapt, check_source
from smoltulu.tasks.data.rows_writer import RowsWriter
from tests import ROOT


def source(format: str, fields: dict[str, str] | None = None, **rest: Any) -> DataSource:
    return DataSource(path="rows.jsonl", format=format, fields=fields or {}, **rest)


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def counted(rows: list[Any], given: DataSource) -> tuple[list[dict[str, Any]], SourceReport]:
    counts = SourceCounts(given)
    made = [row for _, row in counts.normalised(rows)]
    return made, counts.report()


S, Q, A, B = turn("system", "s"), turn("user", "q"), turn("assistant", "a"), turn("assistant", "b")
SFT = {"messages": [Q, A]}
PAIR = {"prompt": [Q], "chosen": [A], "rejected": [B]}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def chat(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


# Spellings of turns


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat({"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}), [Q, A]),
        (chat({"from": "Human", "value": "q"}, {"from": "GPT", "value": "a", "weight": None}), [Q, A]),
        (chat({"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}), [Q, A]),
        (chat({"from": "user", "value": "q"}, {"from": "bing", "value": "a"}), [Q, A]),
        (chat({"role": "User", "content": "q"}, {"role": "MODEL", "parts": [{"text": "a"}]}), [Q, A]),
        (chat({"role": "user", "content": [{"type": "text", "text": "q"}]}, A), [Q, A]),
        (
            chat(turn("user", [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]), A),
            [turn("user", "a b"), A],
        ),
        (chat(turn("developer", "d"), Q, A), [turn("developer", "d"), Q, A]),
        (chat({"from": "system", "value": ""}, Q, A), [Q, A]),
        ({"messages": json.dumps([Q, A])}, [Q, A]),  # CSV
        # Parquet writes what a turn has not as null
        (chat({**Q, "from": None, "tool_calls": None, "name": None}, {**A, "tool_calls": []}), [Q, A]),
        # tools: results behind the call, with or without ids; arguments as JSON text become an object
        (
            chat(
                Q, turn("assistant", None, tool_calls=[{"id": "1", **CALL}]), turn("tool", "9 °C", tool_call_id="1"), A
            ),
            [Q, turn("assistant", "", tool_calls=[{"id": "1", **CALL}]), turn("tool", "9 °C", tool_call_id="1"), A],
        ),
        (
            chat(
                Q,
                turn("assistant", "", function_call={"name": "weather", "arguments": '{"city": "Bonn"}'}),
                turn("function", "9", name="weather"),
                A,
            ),
            [Q, turn("assistant", "", tool_calls=[CALL]), turn("tool", "9", name="weather"), A],
        ),
        (
            chat(
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
                {"from": "observation", "value": "9"},
                {"from": "gpt", "value": "a"},
            ),
            [Q, turn("assistant", "", tool_calls=[CALL]), turn("tool", "9"), A],
        ),
        # reasoning, under three names and as a part
        (chat(Q, {**A, "reasoning_content": "r"}), [Q, {**A, "reasoning_content": "r"}]),
        (chat(Q, {**A, "thinking": "r"}), [Q, {**A, "reasoning_content": "r"}]),
        (
            chat(Q, turn("assistant", [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}])),
            [Q, {**A, "reasoning_content": "r"}],
        ),
        # turns that are not trained
        (chat(Q, {**B, "weight": 0}, Q, {**A, "weight": 1.0}), [Q, {**B, "train": False}, Q, A]),
        (chat({**Q, "weight": 0}, {**B, "train": False}, Q, A), [Q, {**B, "train": False}, Q, A]),
    ],
)
def test_turns_in_every_spelling(row: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    assert adapt(row, source("messages")) == {"messages": expected}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat(turn("user", [{"type": "image_url", "image_url": {"url": "u"}}]), A), "part .* 'image_url'"),
        (chat(turn("user", [{"type": "image"}, {"type": "text", "text": "q"}]), A), "part .* 'image'"),
        (chat({**Q, "images": ["x.png"]}, A), "'images' changes what the row means"),
        (chat(Q, A, images=["x.png"]), "column 'images' changes what the row means"),
        (chat(Q, {**A, "audio": {"id": "x"}}), "'audio' changes"),
        (chat(Q, {**A, "weight": 0.5}), r"'weight' of a turn of messages is '0.5'; allowed are 0 .* and 1"),
        (chat(Q, {**A, "weight": 0}), "no turn of messages is to be trained"),
        (chat(Q, {**A, "weight": 1, "train": False}), "to be trained and not to be trained"),
        (chat(Q, A, weight=0), "'weight' is 0, which changes"),
        (chat(Q, A, loss_weight=0.5), "'loss_weight' is 0.5, which changes"),
        (chat(Q, A, label=False), "'label' is false, which changes"),
        (chat(Q, A, label="False"), "'label' changes"),
        (chat(Q, A, score=0), "'score' is 0, which changes"),
        (chat(Q, A, history=[["q", "a"]]), "'history' changes"),
        (chat(Q, {**A, "channel": "analysis"}), "'channel' changes"),
        (chat(S, Q, A, system="other"), "say another system prompt"),
        (chat(Q, A, system="s", system_prompt="t"), "both say system"),
        (chat(Q, A, A), "roles out of order"),
        (chat(Q, turn("tool", "x"), A), "roles out of order"),
        (chat({"from": "human", "value": "q"}, {"from": "human", "value": "q"}, A), "roles out of order"),
        (chat({"from": "narrator", "value": "q"}, A), "unknown role"),
        (chat({"role": "user", "content": "q", "value": "other"}, A), "both 'content' and 'value'"),
        (
            chat(Q, turn("assistant", "", tool_calls=[{"id": "1", **CALL}]), turn("tool", "x", tool_call_id="2"), A),
            "answers a call that there is not",
        ),
        (
            chat(
                Q, turn("assistant", "", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": "{"}}])
            ),
            "arguments of a tool call of messages is text that is not JSON",
        ),
        (chat(Q, turn("assistant", "", function_call={"name": "f", "arguments": '{"a": 1, "a": 2}'})), "not JSON"),
        (chat(turn("user", "q", tool_calls=[CALL]), A), "a user turn of messages has tool calls"),
        (chat(Q, A, tools=[{"description": "nameless"}]), "no function with a name"),
        (chat(Q, A, tools="["), "tools is text that is not JSON"),
        ({"messages": "\n\nHuman: q\n\nAssistant: a"}, "transcript in one string, hh-rlhf.*format transcript"),
        ({"messages": "SYSTEM: s\n\nUSER: q\n\nASSISTANT: <functioncall> {}"}, "Glaive"),
    ],
)
def test_turns_that_are_refused_by_name(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(MalformedRow, match=reason):
        adapt(row, source("messages"))


def test_turns_in_a_text_are_turns_and_other_json_is_an_answer() -> None:
    row = {"prompt": json.dumps([S, Q]), "chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])}
    assert adapt(row, source("preference")) == {**PAIR, "prompt": [S, Q]}
    row = {"prompt": json.dumps([Q]), "completion": json.dumps([A])}
    assert adapt(row, source("prompt_completion")) == SFT
    answer = json.dumps([{"name": "x", "content": "y"}])
    made = adapt({"prompt": "q", "completion": answer}, source("prompt_completion"))
    assert made == {"messages": [Q, turn("assistant", answer)]}


def test_tools_and_system_prompts_of_columns() -> None:
    row = chat(Q, A, tools=[TOOL], system="s")
    assert adapt(row, source("messages")) == {"messages": [S, Q, A], "tools": [TOOL]}
    bare = {"name": "weather", "parameters": {"type": "object"}}
    for tools in ([bare], json.dumps([bare]), json.dumps(bare)):
        assert adapt(chat(Q, A, functions=tools), source("messages"))["tools"] == [TOOL]
    assert adapt(chat(S, Q, A, system="s", tools=[]), source("messages")) == {"messages": [S, Q, A]}
    mapped = source("messages", {"system": "persona"})
    assert adapt(chat(Q, A, persona="s"), mapped) == {"messages": [S, Q, A]}


def test_calls_that_answer_a_query() -> None:
    row = {"query": "q", "answers": json.dumps([CALL["function"]]), "tools": json.dumps([TOOL["function"]])}
    expected = {"messages": [Q, turn("assistant", "", tool_calls=[CALL])], "tools": [TOOL]}
    assert adapt(row, source("function_calls")) == expected
    with pytest.raises(MalformedRow, match="field 'answers' is text that is not JSON"):
        adapt({**row, "answers": "none"}, source("function_calls"))


def test_a_users_turn_that_is_to_be_trained_is_noticed() -> None:
    made, report = counted([chat({**Q, "train": True}, A)], source("messages"))
    assert made == [SFT]
    assert report.noticed == {"'train' of a user turn is true, and only turns of the assistant are trained": 1}


def test_a_rows_file_of_ours_is_read_as_it_was_written(tmp_path: Path) -> None:
    turns = [Q, turn("assistant", "", tool_calls=[{"id": "1", **CALL}]), turn("tool", "9", tool_call_id="1"), A]
    rows = [
        {"messages": [*turns, Q, {**B, "train": False}], "tools": [TOOL]},
        {"messages": [S, Q, {**A, "reasoning_content": "r"}]},
        SFT,
    ]
    with RowsWriter(tmp_path / "rows.parquet", "sft") as writer:
        for number, row in enumerate(rows):
            writer.write({"id": f"0:{number}", **row})
    made, report = counted(list(read_file(tmp_path / "rows.parquet")), source("messages"))
    assert made == rows and report.unread == {"id": 3}


def test_rows_that_are_nested_deep_are_no_crash() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    _, report = counted([chat(Q, A, note=deep), chat(Q, {**A, "content": deep})], source("messages"))
    assert report.unread == {"note": 1} and report.num_malformed == 1
    call = {"function": {"name": "f", "arguments": {"a": deep}}}
    assert counted([chat(Q, {**A, "tool_calls": [call]})], source("messages"))[1].num_malformed == 1


# Rows of one question and answer


@pytest.mark.parametrize(
    ("row", "given", "expected"),
    [
        (
            {"instruction": "q", "context": "c", "response": "a"},
            source("instruction", {"input": "context", "output": "response"}),
            [turn("user", "q\n\nc"), A],
        ),
        (
            {"system_prompt": "s", "question": "q", "response": "a"},
            source("question_answer", {"answer": "response"}),
            [S, Q, A],
        ),
        ({"prompt": "q", "completion": "a", "system": ""}, source("prompt_completion"), [Q, A]),
        (
            {"instruction": "q", "output": "a", "history": [["q1", "a1"]]},
            source("instruction"),
            [turn("user", "q1"), turn("assistant", "a1"), Q, A],
        ),
        (
            {"question": "q", "answer": "a", "history": [Q, B], "system": "s"},
            source("question_answer"),
            [S, Q, B, Q, A],
        ),
        (
            {"question": "q", "answer": "a", "reasoning_content": "r"},
            source("question_answer"),
            [Q, {**A, "reasoning_content": "r"}],
        ),
        (
            {"question": "q", "answer": "a", "thoughts": "r"},
            source("question_answer", {"reasoning_content": "thoughts"}),
            [Q, {**A, "reasoning_content": "r"}],
        ),
        ({"prompt": "q", "completion": "a", "label": True}, source("prompt_completion"), [Q, A]),
        ({"text": "\n\nHuman: q\n\nAssistant: a"}, source("transcript"), [Q, A]),
        ({"text": "### Human: q### Assistant: a"}, source("transcript"), [Q, A]),
        (
            {
                "text": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
                "<|im_start|>assistant\na<|im_end|>\n"
            },
            source("transcript"),
            [S, Q, A],
        ),
    ],
)
def test_single_answers(row: dict[str, Any], given: DataSource, expected: list[dict[str, Any]]) -> None:
    assert adapt(row, given) == {"messages": expected}


@pytest.mark.parametrize(
    ("row", "given", "reason"),
    [
        ({"prompt": "q", "completion": "a", "label": False}, source("prompt_completion"), "'label' is false"),
        (
            {"question": "q", "answer": "a", "context": "c"},
            source("question_answer"),
            "'context' belongs to the prompt",
        ),
        ({"question": "q", "answer": "B", "choices": ["x", "y"]}, source("question_answer"), "'choices' belongs"),
        ({"question": "q", "answer": "a", "thinking": "r"}, source("question_answer"), "'thinking' changes"),
        ({"instruction": "q", "output": "a", "history": [["q1"]]}, source("instruction"), "no pair of a question"),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "completion": "a"}, source("prompt_completion"), "transcript"),
        ({"prompt": "[INST] q [/INST]", "completion": "a"}, source("prompt_completion"), r"Llama 2's \[INST\]"),
        ({"prompt": "<|user|>\nq\n<|assistant|>\n", "completion": "a"}, source("prompt_completion"), r"<\|user\|>"),
        ({"text": "<|user|>\nq\n<|assistant|>\na"}, source("transcript"), "split it into messages"),
        ({"text": "plain"}, source("transcript"), "is no transcript; read are hh-rlhf, guanaco, ChatML"),
        ({"text": "\n\nHuman: q\n\nHuman: q\n\nAssistant: a"}, source("transcript"), "roles out of order"),
        (
            {"text": "<|im_start|>user\nq<|im_end|> and <|im_start|>assistant\na"},
            source("transcript"),
            "between its turns",
        ),
    ],
)
def test_single_answers_that_are_refused_by_name(row: dict[str, Any], given: DataSource, reason: str) -> None:
    with pytest.raises(MalformedRow, match=reason):
        adapt(row, given)


@pytest.mark.parametrize(
    "text",
    [
        "### User:\nq\n\n### Assistant:\na",
        " ### Human: q\n### Assistant: a",
        "<human>: q\n<bot>: a",
        "<|prompter|>q<|endoftext|><|assistant|>a",
        "<|User|>q<|Assistant|>a",
        "<｜begin▁of▁sentence｜><｜User｜>q<｜Assistant｜>a",
        "A talk.\n[|Human|] q\n[|AI|] a",
        "HUMAN: q\nASSISTANT: a",
        "System: s\nUser: q\nAI: a",
        "user: q\nassistant: a",
        "<|im_start|>user\nq<|im_end|>\n",
    ],
)
def test_a_transcript_is_no_turn_in_whatever_dialect(text: str) -> None:
    for row, given in (
        ({"prompt": text, "completion": "a"}, source("prompt_completion")),
        ({"prompt": "q", "completion": text}, source("prompt_completion")),
        ({"instruction": text, "output": "a"}, source("instruction")),
        ({"prompt": text, "chosen": "a", "rejected": "b"}, source("preference")),
    ):
        if "im_start" in text and given.format == "preference":
            assert adapt(row, given) == PAIR  # a prompt that is one turn
            continue
        with pytest.raises(MalformedRow, match="is a transcript in one string"):
            adapt(row, given)


@pytest.mark.parametrize("text", ["user: who is it?", "Q: q\nA: a", "Say <human>: and <bot>:", "### Users\nAssistant"])
def test_a_text_that_only_speaks_of_speakers_is_a_turn(text: str) -> None:
    assert adapt({"prompt": text, "completion": "a"}, source("prompt_completion")) == chat(turn("user", text), A)


def test_a_prompt_in_a_template_is_noticed_and_a_transcript_in_one_is_refused() -> None:
    prompt = "Below is an instruction.\n\n### Instruction:\nq\n\n### Response:\n"
    made, report = counted([{"prompt": prompt, "completion": "a"}], source("prompt_completion"))
    assert made == [{"messages": [turn("user", prompt), A]}] and list(report.noticed.values()) == [1]
    with pytest.raises(MalformedRow, match="Alpaca's"):
        adapt({"prompt": prompt + "a\n\n### Instruction:\nq", "completion": "a"}, source("prompt_completion"))


# Pairs


@pytest.mark.parametrize(
    ("row", "given", "expected"),
    [
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            source("preference"),
            PAIR,
        ),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "a", "rejected": "b"}, source("preference"), PAIR),
        (
            {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
            source("preference", {"prompt": "question"}),
            {**PAIR, "prompt": [S, Q]},
        ),
        # a system prompt that only the column `prompt` has is kept
        ({"prompt": [S, Q], "chosen": [Q, A], "rejected": [Q, B]}, source("preference"), {**PAIR, "prompt": [S, Q]}),
        ({"chosen": [Q, A], "rejected": [Q, B], "system": "s"}, source("preference"), {**PAIR, "prompt": [S, Q]}),
        (
            {
                "chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                "rejected": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}],
            },
            source("preference"),
            PAIR,
        ),
        (
            {"prompt": "q", "response_1": "b", "response_2": "a", "preference_strength": 2},
            source("preference_by_strength"),
            PAIR,
        ),
        (
            {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": "-1"},
            source("preference_by_strength"),
            PAIR,
        ),
        (
            {
                "instruction": "q",
                "completions": [
                    {"response": "c", "overall_score": 3},
                    {"response": "b", "overall_score": 1},
                    {"response": "a", "overall_score": 5},
                ],
            },
            source("preference_by_score", {"prompt": "instruction"}),
            PAIR,
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "tools": [TOOL]},
            source("preference"),
            {**PAIR, "tools": [TOOL]},
        ),
        # a turn of the prompt that is not to be trained stays marked: trained_turns may be all
        (
            {"prompt": [Q, {**B, "weight": 0}, Q], "chosen": "a", "rejected": "b"},
            source("preference"),
            {**PAIR, "prompt": [Q, {**B, "train": False}, Q]},
        ),
        # what a tool said belongs to the prompt
        (
            {
                "chosen": [Q, turn("assistant", "", tool_calls=[CALL]), turn("tool", "9"), A],
                "rejected": [Q, turn("assistant", "", tool_calls=[CALL]), turn("tool", "9"), B],
            },
            source("preference"),
            {**PAIR, "prompt": [Q, turn("assistant", "", tool_calls=[CALL]), turn("tool", "9")]},
        ),
    ],
)
def test_pairs(row: dict[str, Any], given: DataSource, expected: dict[str, Any]) -> None:
    assert adapt(row, given) == expected


@pytest.mark.parametrize(
    ("row", "given", "reason"),
    [
        ({"prompt": "x", "chosen": [Q, A], "rejected": "b"}, source("preference"), "different types"),
        (
            {"prompt": [turn("user", "z")], "chosen": [Q, A], "rejected": [Q, B]},
            source("preference"),
            "prompt is not what chosen and rejected begin with",
        ),
        (
            {"chosen": "[INST] q [/INST] a", "rejected": "[INST] q [/INST] b", "prompt": "q"},
            source("preference"),
            "'chosen' is a transcript",
        ),
        (
            {
                "prompt": "q<extra_id_1>Assistant\na<extra_id_1>User\nq",
                "response_1": "a",
                "response_2": "b",
                "preference_strength": 1,
            },
            source("preference_by_strength"),
            "HelpSteer's",
        ),
        ({"prompt": "q", "chosen": [{**A, "weight": 0}], "rejected": [B]}, source("preference"), "not to be trained"),
        (
            {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": "high"},
            source("preference_by_strength"),
            "is not a number",
        ),
        (
            {"prompt": "q", "completions": [{"response": "a", "score": 1}]},
            source("preference_by_score"),
            "fewer than two",
        ),
        (
            {"prompt": "q", "completions": [{"response": "a"}, {"response": "b"}]},
            source("preference_by_score"),
            "no score",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1},
            source("preference"),
            "the rejected answer has no score",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            source("preference", min_margin=1),
            "no scores, which min_margin",
        ),
    ],
)
def test_pairs_that_are_refused_by_name(row: dict[str, Any], given: DataSource, reason: str) -> None:
    with pytest.raises(MalformedRow, match=reason):
        adapt(row, given)


SCORED = [
    {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": chosen, "score_rejected": rejected}
    for chosen, rejected in ((5, 1), (3, 3), (2, 4), (4, 3.5))
]


def test_scores_are_noticed_and_knobs_leave_pairs_out() -> None:
    against, same = "rejected is scored above chosen", "chosen and rejected have the same score"
    made, report = counted(SCORED, source("preference"))
    assert len(made) == 4 and report.noticed == {same: 1, against: 1} and report.unread == {}
    made, report = counted(SCORED, source("preference", ties="drop", rejected_above_chosen="drop"))
    assert len(made) == 2 and report.dropped == {same: 1, against: 1} and report.num_malformed == 0
    made, report = counted(SCORED, source("preference", ties="malformed", rejected_above_chosen="malformed"))
    assert len(made) == 2 and report.reasons == {same: 1, against: 1} and report.num_dropped == 0
    made, report = counted(SCORED, source("preference", min_margin=1, rejected_above_chosen="drop"))
    assert len(made) == 1 and report.dropped == {"the margin is below min_margin (1)": 2, against: 1}
    # Other names of scores, and a margin alone.
    for names in (
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("rating_chosen", "rating_rejected"),
    ):
        row = {"prompt": "q", "chosen": "a", "rejected": "b", names[0]: 1, names[1]: 2}
        assert counted([row], source("preference"))[1].noticed == {against: 1}
    assert counted([{"prompt": "q", "chosen": "a", "rejected": "b", "margin": -1}], source("preference"))[1].noticed
    mapped = source("preference", {"score_chosen": "good", "score_rejected": "bad"})
    assert counted([{"prompt": "q", "chosen": "a", "rejected": "b", "good": 1, "bad": 2}], mapped)[1].noticed


def test_ties_and_empty_answers_are_told_apart_from_broken_rows() -> None:
    rows: list[Any] = [
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": None, "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": " "},
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, turn("assistant", "")]},
        {"prompt": "q", "rejected": "b"},
        3,
    ]
    broken = {"field 'chosen' is missing": 1, "row is not an object": 1}
    empty = {
        "field 'chosen' is null": 1,
        "field 'rejected' is empty": 1,
        "empty assistant turn in rejected": 1,
    }
    tie = {"chosen equals rejected": 1}
    assert counted(rows, source("preference"))[1].reasons == tie | empty | broken
    _, report = counted(rows, source("preference", ties="drop"))
    assert (report.dropped, report.reasons) == (tie, empty | broken)
    _, report = counted(rows, source("preference", empty_answers="drop", ties="drop"))
    assert (report.dropped, report.reasons) == (tie | empty, broken) and report.num_malformed == 2
    # An empty turn that is no answer of the pair is a fault, whatever is said of empty answers.
    none, empty_answer = turn("user", ""), turn("assistant", "")
    rows = [
        {"prompt": [none], "chosen": "a", "rejected": "b"},
        {"prompt": [Q, empty_answer, Q], "chosen": "a", "rejected": "b"},
        {"chosen": [none, A], "rejected": [none, B]},
        {"chosen": [Q, empty_answer, Q, A], "rejected": [Q, empty_answer, Q, B]},
    ]
    assert counted(rows, source("preference", empty_answers="drop"))[1].num_malformed == 4
    strength = {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0}
    with pytest.raises(DroppedRow, match="tie"):
        adapt(strength, source("preference_by_strength", ties="drop"))
    with pytest.raises(MalformedRow, match="tie"):
        adapt(strength, source("preference_by_strength"))


def test_labelled_answers_become_pairs_where_both_labels_are_there() -> None:
    def row(prompt: str, completion: str, label: Any) -> dict[str, Any]:
        return {"prompt": prompt, "completion": completion, "label": label}

    rows = [
        row("p", "good 1", True),
        row("q", "alone", "true"),
        row("p", "good 2", True),
        row("p", "bad 1", False),
        row("p", "", False),
        row("p", "bad 2", "False"),
        row("r", "bad alone", 0),
        row("p", "good 3", True),
        row("p", "x", "maybe"),
    ]
    counts = SourceCounts(source("kto"))
    made = list(counts.normalised(rows))
    assert [(place, pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for place, pair in made] == [
        (3, "good 1", "bad 1"),
        (5, "good 2", "bad 2"),
    ]
    assert made[0][1]["prompt"] == [turn("user", "p")]
    report = counts.report()
    assert (report.num_rows, report.num_merged, report.num_malformed, report.num_dropped) == (9, 2, 2, 3)
    assert report.dropped == {
        "label is true, and no row with label false has its prompt": 2,
        "label is false, and no row with label true has its prompt": 1,
    }


# What is not read


def test_what_no_field_reads_is_counted_by_name() -> None:
    rows = [
        chat({**Q, "id": 1}, A, source="x", empty="", nothing=None),
        chat(Q, {**A, "id": 2, "meta": {}}, source="y", lang="de"),
        chat(Q, source="z"),  # malformed, so it is not counted here
    ]
    _, report = counted(rows, source("messages"))
    assert report.unread == {"messages[].id": 2, "source": 2, "lang": 1} and report.num_malformed == 1
    _, report = counted([chat(Q, A, **{f"c{number}": 1}) for number in range(1000)], source("messages"))
    assert len(report.unread) == 201 and sum(report.unread.values()) == 1000 and "other columns" in report.unread


def test_completions_are_compared_by_a_score_that_all_have() -> None:
    given = source("preference_by_score")
    rows = [
        {"response": "a", "fine-grained_score": None, "overall_score": 7},  # of 10
        {"response": "b", "fine-grained_score": 4.5, "overall_score": 9},  # of 5, and of 10
    ]
    made = adapt({"prompt": "q", "completions": rows}, given)
    assert made["chosen"] == [B] and made["rejected"] == [A]
    rows[1] = {"response": "b", "fine-grained_score": 4.5}
    with pytest.raises(MalformedRow, match="no score is of all completions"):
        adapt({"prompt": "q", "completions": rows}, given)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"messages": [Q, A]}, "messages"),
        ({"instruction": "q", "output": "a"}, "instruction"),
    ],
)
def test_a_bad_answer_is_no_demonstration_whatever_its_label_is_called(row: dict[str, Any], format: str) -> None:
    given = source(format)
    for name in ("kto_tag", "is_chosen", "thumbs_up"):
        with pytest.raises(MalformedRow, match=f"'{name}' is false"):
            adapt({**row, name: False}, given)
        assert adapt({**row, name: True}, given) == {"messages": [Q, A]}


@pytest.mark.parametrize(
    "name", ["System", "systemInstruction", "loss-weight", "Images", "image_url", "chat_history", "toolCalls"]
)
def test_a_column_that_changes_what_a_row_means_is_known_in_every_spelling(name: str) -> None:
    with pytest.raises(MalformedRow, match=f"'{name}'.* changes what the row means"):
        adapt({**SFT, name: ["x"]}, source("messages"))
    assert adapt({**SFT, name: ["x"]}, source("messages", ignore=(name,))) == SFT


def test_what_the_user_ignores_is_counted() -> None:
    rows = [chat(Q, {**A, "weight": 0.5}, images=["x"]), chat(Q, A, images=[]), chat(Q, A)]
    assert counted(rows, source("messages"))[1].num_malformed == 1
    made, report = counted(rows, source("messages", ignore=("images", "weight", "none")))
    assert made == [SFT] * 3 and report.ignored == {"images": 1, "weight": 1, "none": 0}
    with pytest.raises(ValueError, match="ignore names messages, which format 'messages' reads"):
        check_source(source("messages", ignore=("messages",)), "sft")


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (source("messages", ties="drop"), "sft", "ties is said of pairs"),
        (source("kto", min_margin=1), "preference", "min_margin needs scores, which format 'kto' has not"),
        (source("kto", {"answer": "x"}), "preference", "has no field answer"),
    ],
)
def test_settings_that_do_nothing_are_refused(given: DataSource, kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_source(given, kind)


def test_settings_that_are_not_given_leave_keys_as_they_were() -> None:
    plain = scientific(source("preference"))
    assert not plain.keys() & {"ignore", "ties", "empty_answers", "min_margin", "rejected_above_chosen"}
    given = source("preference", ignore=["x"], ties="drop", min_margin=0, rejected_above_chosen="drop")
    added = {"ignore": ["x"], "ties": "drop", "min_margin": 0.0, "rejected_above_chosen": "drop"}
    assert scientific(given) == plain | added


def test_names_of_other_tools_say_what_to_write() -> None:
    with pytest.raises(ValidationError, match=r"write format: messages, fields: \{messages: conversations\}"):
        source("sharegpt")
    with pytest.raises(ValidationError, match="input: context, output: response"):
        source("Dolly")


def test_the_page_has_a_row_of_every_form_and_each_is_read() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    examples = dict(re.findall(r"^### `(\w+)`\n```yaml\n(.*?)```", page, re.DOTALL | re.MULTILINE))
    assert set(examples) == {name for kind in ("sft", "preference", "rlvr") for name in KIND_FORMATS[kind]}
    for name, text in examples.items():
        assert text.count("\n") <= 5, name
        fields = yaml.safe_load(found[1]) if (found := re.search(r"^# fields: (.*)$", text, re.MULTILINE)) else {}
        rows = [yaml.safe_load(line) for line in text.splitlines()] if name == "kto" else [yaml.safe_load(text)]
        given = source(name, fields)
        check_source(given, next(kind for kind, names in KIND_FORMATS.items() if name in names))  # type: ignore[arg-type]
        made, report = counted([row for row in rows if row is not None], given)
        assert len(made) == 1 and report.num_malformed == report.num_dropped == 0, (name, report.reasons)
    assert adapt(yaml.safe_load(examples["messages"]), source("messages")) == {
        "messages": [
            turn("system", "Answer briefly."),
            turn("user", "Weather in Bonn?"),
            turn("assistant", "Dry."),
        ]
    }
