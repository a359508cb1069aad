"""Forms that give pairs of a better and a worse answer, and what scores say about a pair."""

from __future__ import annotations

import math
from typing import Any

from smoltulu.tasks.data.formats.columns import OF_PAIRS, Row
from smoltulu.tasks.data.formats.sft import earlier_turns, with_system, with_tools
from smoltulu.tasks.data.formats.transcripts import is_transcript, refuse_transcript, turns_of_transcript
from smoltulu.tasks.data.formats.turns import as_turns, check_order, conversation, is_conversation, read_turns, unpacked
from smoltulu.tasks.data.formats.values import (
    DroppedRow,
    EmptyAnswer,
    MalformedRow,
    Message,
    Tie,
    is_empty,
    kind_of,
    text_of,
)

#: Scores of one answer in a list of several: UltraFeedback (its `overall_score` is known to be wrong in places, so the
#: mean of the aspects comes first, as in its binarized versions), then the plain names.
_SCORES = ("fine-grained_score", "overall_score", "score", "rating", "reward")
_RESPONSES = ("response", "content", "text", "output")


def read_preference(row: Row) -> dict[str, Any]:
    """`chosen` and `rejected`: answers to `prompt`, whole conversations, or transcripts."""
    chosen, rejected = unpacked(row.answer("chosen")), unpacked(row.answer("rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise MalformedRow("chosen and rejected are of different types")
    if is_transcript(chosen) and is_transcript(rejected):
        chosen, rejected = (_answered(text, name) for text, name in ((chosen, "chosen"), (rejected, "rejected")))
    if is_conversation(chosen) and is_conversation(rejected):
        pair = _implicit_pair(chosen, rejected, row)
        return _finished(pair, row, _margin(row))
    prompt = unpacked(row.need("prompt"))
    pair = _pair_of(prompt_of(prompt, row), {"chosen": chosen, "rejected": rejected}, row)
    return _finished(pair, row, _margin(row), one_text=isinstance(prompt, str))


def read_by_label(row: Row) -> dict[str, Any]:
    """`input`, two outputs and a `label` that says which is better: 1 or 2."""
    prompt = prompt_of(row.text("input"), row)
    first, second = row.answer("output_1"), row.answer("output_2")
    for value, name in ((first, "output_1"), (second, "output_2")):
        text_of(value, name)
    label = row.need("label")
    if isinstance(label, str) and label.strip().lower() == "tie":
        raise Tie("label says that the answers tie")
    # A csv file gives text, and True == 1 in Python.
    if isinstance(label, bool) or label not in (1, 2, "1", "2"):
        raise MalformedRow("label is neither 1 nor 2")
    better, worse = (first, second) if int(label) == 1 else (second, first)
    pair = _pair_of(prompt, {"chosen": better, "rejected": worse}, row)
    return _finished(pair, row, None, one_text=True)


def read_by_strength(row: Row) -> dict[str, Any]:
    """`prompt`, two responses and a `preference_strength`: below 0 the first is better, above 0 the second
    (HelpSteer2: -3 to 3); its size is the margin."""
    prompt = row.need("prompt")
    turns = prompt_of(prompt, row)
    first, second = row.answer("response_1"), row.answer("response_2")
    strength = _number(row.need("preference_strength"), "preference_strength")
    if strength == 0:
        raise Tie("preference_strength says that the answers tie")
    better, worse = (first, second) if strength < 0 else (second, first)
    pair = _pair_of(turns, {"chosen": better, "rejected": worse}, row)
    return _finished(pair, row, abs(strength), one_text=isinstance(prompt, str))


def read_by_score(row: Row) -> dict[str, Any]:
    """`prompt` and `completions`, each an object with a response and a score: the best against the worst (raw
    UltraFeedback). Of equals the first is taken; the answers between them are counted as unread."""
    prompt = row.need("prompt")
    turns = prompt_of(prompt, row)
    completions = row.need("completions")
    if not isinstance(completions, list) or not all(isinstance(one, dict) for one in completions):
        raise MalformedRow("field 'completions' is not a list of objects")
    if len(completions) < 2:
        raise MalformedRow("fewer than two completions")
    # One scale for all: the aspects of UltraFeedback go to 5, its overall score to 10.
    score = next((key for key in _SCORES if all(one.get(key) is not None for one in completions)), None)
    if score is None:
        some = any(one.get(key) is not None for one in completions for key in _SCORES)
        raise MalformedRow(
            f"no score {'is of all completions' if some else 'in completions'}; read: {', '.join(_SCORES)}"
        )
    scored = [_scored(completion, score) for completion in completions]
    best = max(range(len(scored)), key=lambda place: scored[place][1])
    worst = min(range(len(scored)), key=lambda place: scored[place][1])
    margin = scored[best][1] - scored[worst][1]
    if margin == 0:
        raise Tie("all completions have the same score")
    for place, completion in enumerate(completions):
        named, _ = scored[place]
        if place not in (best, worst):
            row.unread.add("completions[] between the best and the worst")
            continue
        row.unread.update(
            f"completions[].{key}"
            for key, value in completion.items()
            if key not in (named, score) and not is_empty(value)
        )
    better, worse = (completions[place][scored[place][0]] for place in (best, worst))
    if is_empty(better) or is_empty(worse):
        raise EmptyAnswer("the best or the worst completion is empty")
    pair = _pair_of(turns, {"chosen": better, "rejected": worse}, row)
    return _finished(pair, row, margin, one_text=isinstance(prompt, str))


def _scored(completion: dict[str, Any], score: str) -> tuple[str, float]:
    """The key of an answer, and its score."""
    response = next((key for key in _RESPONSES if key in completion), None)
    if response is None:
        raise MalformedRow(f"a completion has no {_RESPONSES[0]}")
    return response, _number(completion[score], f"completions[].{score}")


def prompt_of(value: Any, row: Row) -> list[Message]:
    """The prompt as messages that end with the user's turn: of a text, of turns, or of a transcript with a cue."""
    if is_transcript(value):
        turns = read_turns(turns_of_transcript(value, "prompt"), "prompt", row)
    else:
        refuse_transcript(value, "prompt")
        turns = read_turns(as_turns(value, "prompt", "user"), "prompt", row)
        if isinstance(value, str):
            turns = earlier_turns(row) + turns
    turns = with_system(turns, row)
    check_order(turns, "prompt", last="user")
    return turns


def _answered(text: str, name: str) -> list[Message]:
    """The turns of a transcript that has an answer."""
    turns = turns_of_transcript(text, name)
    if turns[-1]["role"] == "user":
        raise EmptyAnswer(f"{name} is a transcript without an answer")
    return turns


def _pair_of(prompt: list[Message], answers: dict[str, Any], row: Row) -> dict[str, Any]:
    """A pair of answers, texts or turns, behind their prompt."""
    made = answers_of(prompt, answers, row)
    return _pair(prompt, made["chosen"], made["rejected"])


def answers_of(prompt: list[Message], answers: dict[str, Any], row: Row) -> dict[str, list[Message]]:
    """Name -> turns of an answer, a text or turns, checked behind its prompt."""
    made = {}
    for name, value in answers.items():
        refuse_transcript(value, name)
        turns = read_turns(as_turns(value, name, "assistant"), name, row)
        _check_trained(turns, name)
        check_order(prompt + turns, name, last="assistant")
        made[name] = turns
    return made


def _implicit_pair(chosen: Any, rejected: Any, row: Row) -> dict[str, Any]:
    """Two whole conversations: the prompt is what they share, up to the last turn of it before an answer."""
    first = conversation(chosen, "chosen", "assistant", row)
    second = conversation(rejected, "rejected", "assistant", row)
    plain = [[_untrained(message) for message in turns] for turns in (first, second)]
    if plain[0] == plain[1]:
        raise Tie("chosen equals rejected")
    shared = 0
    while shared < min(len(first), len(second)) and plain[0][shared] == plain[1][shared]:
        shared += 1
    while shared and first[shared - 1]["role"] not in ("user", "tool"):
        shared -= 1
    if not shared:
        raise MalformedRow("chosen and rejected share no prompt")
    for turns, name in ((first, "chosen"), (second, "rejected")):
        _check_trained(turns[shared:], name)
    prompt = _with_prompt_column(plain[0][:shared], row)
    for place in range(1, shared + 1):  # from the end: a system turn may stand before
        if "train" in first[shared - place] or "train" in second[shared - place]:
            prompt[-place] = {**prompt[-place], "train": False}
    return _pair(prompt, first[shared:], second[shared:])


def _with_prompt_column(prompt: list[Message], row: Row) -> list[Message]:
    """The shared prompt, beside a column `prompt`: turns must say the same, and may say the system prompt first; a
    text may repeat a part of it (the Tulu 3 preference mixture), another text is counted as unread."""
    column = row.column("prompt")
    given = unpacked(row.values.get(column))
    if is_empty(given):
        return with_system(prompt, row)
    if not isinstance(given, list):
        if not isinstance(given, str) or not any(given.strip() in message["content"] for message in prompt):
            row.unread.add(str(column))
        return with_system(prompt, row)
    turns = [_untrained(message) for message in read_turns(given, "prompt", row)]
    if turns == prompt or (turns[1:] == prompt and turns[0]["role"] in ("system", "developer")):
        return with_system(turns, row)
    if (prompt[1:] == turns and prompt[0]["role"] in ("system", "developer")) or _ends_with(prompt, turns):
        return with_system(prompt, row)
    raise MalformedRow("prompt is not what chosen and rejected begin with")


def _ends_with(prompt: list[Message], turns: list[Message]) -> bool:
    return len(turns) > 0 and prompt[-len(turns) :] == turns


def _untrained(message: Message) -> Message:
    """A turn as it is said. Of a prompt, `train` counts only where trained_turns is all."""
    return {key: value for key, value in message.items() if key != "train"} if "train" in message else message


def _check_trained(turns: list[Message], name: str) -> None:
    if any("train" in message for message in turns):
        raise MalformedRow(f"a turn of {name} is not to be trained, which pairs cannot have")


def _pair(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> dict[str, Any]:
    if chosen == rejected:
        raise Tie("chosen equals rejected")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _finished(pair: dict[str, Any], row: Row, margin: float | None, one_text: bool = False) -> dict[str, Any]:
    made = with_tools(pair, row)
    row.finish(one_text=one_text, harmless=OF_PAIRS)
    _judge(margin, row)
    return made


def _margin(row: Row) -> float | None:
    """By how much the scores of a row prefer the chosen answer; None where it has none."""
    chosen, rejected = row.optional("score_chosen"), row.optional("score_rejected")
    given = row.optional("margin")
    if (chosen is None) != (rejected is None):
        raise MalformedRow(f"the {'chosen' if chosen is None else 'rejected'} answer has no score, the other one has")
    if chosen is None:
        return None if given is None else _number(given, "margin")
    margin = _number(chosen, "score_chosen") - _number(rejected, "score_rejected")
    if given is not None and not math.isclose(_number(given, "margin"), margin, rel_tol=1e-3, abs_tol=1e-3):
        row.unread.add(row.source.fields.get("margin", "margin"))
    return margin


def _number(value: Any, name: str) -> float:
    """A finite number, also one that a CSV file has as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise MalformedRow(f"field {name!r} is {kind_of(value)}, not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise MalformedRow(f"field {name!r} is not a number") from None
    if not math.isfinite(number):
        raise MalformedRow(f"field {name!r} is not a finite number")
    return number


def _judge(margin: float | None, row: Row) -> None:
    """What the source says of a pair with such a margin."""
    source = row.source
    if margin is None:
        if source.min_margin is not None:
            raise MalformedRow("no scores, which min_margin needs")
        return
    if margin < 0:
        reason = "rejected is scored above chosen"
        if source.rejected_above_chosen == "drop":
            raise DroppedRow(reason)
        if source.rejected_above_chosen == "malformed":
            raise MalformedRow(reason)
        row.noticed.add(reason)
    if margin == 0:
        reason = "chosen and rejected have the same score"
        if source.ties is not None:
            raise Tie(reason)
        row.noticed.add(reason)
    if source.min_margin is not None and margin < source.min_margin:
        raise DroppedRow(f"the margin is below min_margin ({source.min_margin:g})")
