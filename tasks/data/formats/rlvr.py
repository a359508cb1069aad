"""The form of prompts with a verifiable answer."""

from __future__ import annotations

import json
import math
from typing import Any

from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data.files import WrittenFloat
from smoltulu.tasks.data.formats.columns import OF_TRUTHS, Row
from smoltulu.tasks.data.formats.sft import earlier_turns, listed, with_system, with_tools
from smoltulu.tasks.data.formats.turns import as_turns, check_order, read_turns
from smoltulu.tasks.data.formats.values import MalformedRow, Message, kind_of, text_of
from smoltulu.tasks.verifiers import canonical_name, fault_of_truth


def read_rlvr(row: Row) -> dict[str, Any]:
    """A prompt that ends with the user's turn, what is right, and the verifier that knows it."""
    source = row.source
    names = ("messages", "prompt", "question")
    # A mapped field is the user's word; without one, the first that the row has.
    name = next(
        (name for name in names if name in source.fields),
        next((name for name in names if row.values.get(name) is not None), None),
    )
    if name is None:
        raise MalformedRow("no messages, prompt or question")
    asked = row.need(name)
    prompt = _prompt(asked, name, row)
    verifier = _verifier(row.get("verifier"), source)
    truth = row.get("ground_truth")
    if truth is None or truth == "":
        raise MalformedRow("no ground truth")
    truth = text_of(_truth_as_text(truth), "ground_truth")
    if (fault := fault_of_truth(verifier, truth)) is not None:
        raise MalformedRow(f"ground truth that {verifier} cannot grade: {fault}")
    made = with_tools({"prompt": prompt, "verifier": verifier, "ground_truth": truth}, row)
    row.finish(one_text=isinstance(asked, str), harmless=OF_TRUTHS)
    return made


def _prompt(asked: Any, name: str, row: Row) -> list[Message]:
    asked = listed(asked, name)
    turns = read_turns(as_turns(asked, name, "user"), name, row)
    if isinstance(asked, str):
        turns = earlier_turns(row) + turns
    turns = [{key: value for key, value in turn.items() if key != "train"} for turn in with_system(turns, row)]
    check_order(turns, name, last="user")
    return turns


def _verifier(named: Any, source: DataSource) -> str:
    """The verifier of a row in its one spelling: what the row names, by way of `verifiers`; else the source's."""
    if named is None or named == "":
        if source.verifier is None:
            raise MalformedRow("no verifier")
        return canonical_name(source.verifier)
    name = text_of(named, "verifier").strip().lower()
    name = {theirs.lower(): ours for theirs, ours in (source.verifiers or {}).items()}.get(name, name)
    try:
        return canonical_name(name)
    except ValueError as error:
        raise MalformedRow(f"unknown verifier {name[:40]!r}") from error


def _truth_as_text(truth: Any) -> str:
    """A number as it is written; a list as JSON of texts, of which any is right; an object as JSON."""
    if isinstance(truth, str):
        return truth
    try:
        if isinstance(truth, list):  # [18, 19] as text would be an interval
            if any(isinstance(item, bool) or not isinstance(item, (str, int, float)) for item in truth):
                raise MalformedRow("a list of right answers holds what is neither text nor a number")
            truth = [item if isinstance(item, str) else _as_json(item) for item in truth]
        return _as_json(truth)
    except (TypeError, ValueError, RecursionError) as error:
        raise MalformedRow(f"field 'ground_truth' is {kind_of(truth)} without a JSON form") from error


def _as_json(value: Any) -> str:
    """A number as it was written, anything else as JSON. Raises what `json.dumps` raises."""
    if isinstance(value, WrittenFloat) and math.isfinite(value):
        return value.text
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
