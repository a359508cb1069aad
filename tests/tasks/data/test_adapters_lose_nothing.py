"""No text of a row is lost uncounted: it is in the normalised row, in a part that is counted by name, or the row is
malformed or dropped with a reason."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data.formats import FORMS, DroppedRow, MalformedRow, SourceCounts
from smoltulu.tasks.data.formats.columns import ALIASES, CHANGES_MEANING, PROMPT_PARTS, TURN_CHANGES_MEANING, Row
from smoltulu.tasks.data.formats.turns import _read_turn, check_order, read_turns
from smoltulu.tasks.data.formats.values import is_empty

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "§"},
    {"role": "user", "content": "§"},
    {"role": "assistant", "content": "§", "reasoning_content": "§", "weight": 0},
    {"role": "user", "content": [{"type": "text", "text": "§"}, {"type": "text", "text": "§", "cache_control": "§"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "§", "type": "function", "function": {"name": "§", "arguments": {"§": ["§", {"§": 1}]}}}],
    },
    {"role": "tool", "content": "§", "name": "§"},
    {"role": "assistant", "content": "§", "id": "§"},
]  # fmt: skip
SHAREGPT = [{"from": "human", "value": "§"}, {"from": "gpt", "value": "§"}]
ENDS = ["user", "assistant"]
TOOLS = [{"name": "§", "description": "§", "parameters": {"type": "object", "properties": {"§": {"type": "§"}}}}]
SAME = {"role": "user", "content": "q"}
ASKED = [{"role": "user", "content": "§"}]

#: Format -> rows that it reads; § is a text that stands nowhere else.
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": TURNS, "tools": TOOLS}, {"messages": SHAREGPT, "system_prompt": "§", "source": "§"}],
    "prompt_completion": [
        {"prompt": "§", "completion": "§", "system": "§", "history": [["§", "§"]], "reasoning_content": "§"},
        {"prompt": ASKED, "completion": [{"role": "assistant", "content": "§"}], "note": {"a": ["§"]}},
    ],
    "instruction": [{"instruction": "§", "input": "§", "output": "§", "system_message": "§"}],
    "question_answer": [{"question": "§", "answer": "§", "tools": json.dumps(TOOLS[0])}],
    "function_calls": [{"query": "§", "answers": [{"name": "§", "arguments": {"§": "§"}}], "tools": TOOLS, "id": "§"}],
    "transcript": [{"text": "\n\nHuman: §\n\nAssistant: §\n\nHuman: §\n\nAssistant: §"}],
    "preference": [
        {"prompt": "§", "chosen": "§", "rejected": "§", "score_chosen": 2, "score_rejected": 1},
        {"prompt": "§", "chosen": [SAME, TURNS[6]], "rejected": [SAME, TURNS[6]]},
        {"chosen": "\n\nHuman: q\n\nAssistant: §", "rejected": "\n\nHuman: q\n\nAssistant: §", "system": "§"},
    ],
    "preference_by_label": [{"input": "§", "output_1": "§", "output_2": "§", "label": 2}],
    "preference_by_strength": [{"prompt": "§", "response_1": "§", "response_2": "§", "preference_strength": -1}],
    "preference_by_score": [
        {"prompt": "§", "completions": [{"response": "§", "score": score, "model": "§"} for score in (1, 5, 3)]}
    ],
    "rlvr": [
        {"messages": TURNS[:2], "verifier": "gsm8k", "ground_truth": "#### 7", "constraint": "§"},
        {"messages": TURNS[:2], "verifier": "gsm8k", "ground_truth": "#### 7", "tools": TOOLS},
    ],
    "text": [{"text": "§", "more": "§"}],
}
#: kto looks at more than one row, and all_text keeps every text by its own rule.
ONE_ROW = [name for name in FORMS if name not in ("kto", "all_text")]
_NAMES = sorted(
    {*CHANGES_MEANING, *TURN_CHANGES_MEANING, *PROMPT_PARTS, *(name for names in ALIASES.values() for name in names)}
    | {name for form in FORMS.values() for name in form.names}
    | {"role", "from", "content", "value", "parts", "type", "function", "arguments", "parameters", "response", "id"}
)


def marked(value: Any, number: Iterator[int]) -> Any:
    """A copy in which every § has a number of its own."""
    if isinstance(value, str):
        return "".join(f"mark{next(number)}k" if character == "§" else character for character in value)
    if isinstance(value, list):
        return [marked(inner, number) for inner in value]
    if isinstance(value, dict):
        return {marked(key, number): marked(inner, number) for key, inner in value.items()}
    return value


def changed(row: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """The row with a few keys and values more, fewer, or elsewhere."""
    row = copy.deepcopy(row)
    for _ in range(chance.randrange(4)):
        places = [row, *_containers(row)]
        place = chance.choice(places)
        value = chance.choice(["§", ["§"], {"§": "§"}, "", None, 0, 1, False, True, "§ §", [], copy.deepcopy(ASKED)])
        if isinstance(place, dict):
            action = chance.randrange(4)
            if action == 0 and len(place) > 1:
                place.pop(chance.choice(list(place)))
            elif action == 1 and place:
                place[chance.choice(list(place))] = value
            else:
                place[chance.choice([*_NAMES, "§"])] = value
        elif chance.random() < 0.5 or not place:
            place.insert(chance.randrange(len(place) + 1), value)
        else:
            place.pop(chance.randrange(len(place)))
    return row


def _containers(value: Any) -> list[Any]:
    inner = list(value.values()) if isinstance(value, dict) else value
    found = [one for one in inner if isinstance(one, (dict, list))]
    return found + [deeper for one in found for deeper in _containers(one)]


def texts_of(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and text of every text, keys of objects inside of columns included."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner, f"{path}[]")
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from texts_of(inner, f"{path}.{key}" if path else str(key))
            if path and not is_empty(inner):
                yield f"{path}.{key}", str(key)


def words(value: Any) -> set[str]:
    return {word for _, text in texts_of(value, "made") for word in _MARK.findall(text)}


_MARK = re.compile(r"mark\d+k")


def check_nothing_is_lost(row: dict[str, Any], source: DataSource) -> bool:
    """Whether the row was normalised. AssertionError where a text of it is nowhere."""
    counts = SourceCounts(source)
    before = json.dumps(row)
    made = [normalised for _, normalised in counts.normalised([row])]
    assert json.dumps(row) == before
    report = counts.report()
    if not made:
        assert report.num_malformed + report.num_dropped == 1
        assert all(report.reasons) and all(report.dropped)
        return False
    kept = words(made)
    counted = [name.partition(" between")[0] for name in (*report.unread, *report.ignored)]
    for path, text in texts_of(row):
        for word in _MARK.findall(text):
            where = [name for name in counted if path == name or path.startswith((f"{name}.", f"{name}["))]
            keys = {part.rstrip("[]") for part in path.split(".")}
            assert word in kept or where or keys & set(source.ignore), (path, text, report.unread, made)
    return True


@pytest.mark.parametrize("format", ONE_ROW)
def test_the_rows_of_this_test_are_read(format: str) -> None:
    for row in ROWS[format]:
        assert check_nothing_is_lost(marked(row, iter(range(1000))), DataSource(path="x", format=format)), row


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    format=st.sampled_from(ONE_ROW),
    seed=st.integers(0, 2**32),
    ignore=st.lists(st.sampled_from(_NAMES), max_size=2, unique=True),
)
def test_no_text_is_lost_uncounted(format: str, seed: int, ignore: list[str]) -> None:
    chance = random.Random(seed)
    row = marked(changed(chance.choice(ROWS[format]), chance), iter(range(10_000)))
    check_nothing_is_lost(row, DataSource(path="x", format=format, ignore=tuple(ignore)))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_answer_of_labelled_rows_is_lost_uncounted(seed: int) -> None:
    chance, number = random.Random(seed), iter(range(10_000))
    rows = []
    for _ in range(chance.randrange(12)):
        row = {"prompt": chance.choice("pq"), "completion": "§", "label": chance.choice([True, False])}
        rows.append(marked(changed(row, chance) if chance.random() < 0.3 else row, number))
    counts = SourceCounts(DataSource(path="x", format="kto"))
    pairs = [pair for _, pair in counts.normalised(rows)]
    report = counts.report()
    assert report.num_rows == len(rows)
    assert 2 * len(pairs) + report.num_malformed + report.num_dropped == len(rows)
    assert report.num_merged == len(pairs)
    for pair in pairs:
        texts = [pair[side][-1]["content"] for side in ("chosen", "rejected")]
        labels = [next(row["label"] for row in rows if row.get("completion") == text) for text in texts]
        assert labels == [True, False]


_said = st.sampled_from(["system", "user", "assistant", "User", "human", "gpt", "tool", 3, None])
_text = st.one_of(st.text(max_size=4), st.sampled_from([" ", "\u2003", "a\0", "\ud800", None, "a b"]))
_plain_turns = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": _said, "content": _text}),
        st.fixed_dictionaries({"from": _said, "value": _text}),
        st.dictionaries(st.sampled_from(["role", "from", "content", "value"]), st.one_of(_said, _text), max_size=2),
    ),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(turns=_plain_turns)
def test_plain_turns_are_read_fast_as_they_are_read_slowly(turns: list[dict[str, Any]]) -> None:
    row = Row({}, DataSource(path="x", format="messages"))

    def outcome(read: Any) -> Any:
        try:
            return read()
        except MalformedRow as error:
            return str(error)

    slow = outcome(lambda: [one for turn in turns if (one := _read_turn(turn, "messages", row)) is not None])
    if turns:
        assert outcome(lambda: read_turns(turns, "messages", row)) == slow


@settings(max_examples=300, deadline=None)
@given(roles=st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=6), last=st.sampled_from(ENDS))
def test_plain_orders_are_those_that_the_rules_allow(roles: list[str], last: str) -> None:
    def allowed(**more: Any) -> bool:
        try:
            check_order([{"role": role, "content": "x", **more} for role in roles], "messages", last)
        except MalformedRow:
            return False
        return True

    assert allowed() == allowed(name="n")  # a turn with more than two keys goes the long way


def test_a_dropped_row_is_no_malformed_one() -> None:
    assert not issubclass(DroppedRow, MalformedRow)
