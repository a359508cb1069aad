"""Which prompts a page shows with the answers of every model, and what stands beside each answer.

The choice is fixed by the items alone: a second page of the same evaluations shows the same prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from smoltulu.schemas.verdict import Answer, AnsweredPrompt, Fate
from smoltulu.tasks.comparison.evaluations import Item, Measured

NUM_PROMPTS = 20
#: So many of each kind are shown, where there are as many, whatever else there is; the rest is filled in this order.
_AT_LEAST: dict[str, int] = {"flipped": 10, "truncated": 4, "wrong": 4, "right": 2}
_MARKS = {
    "is_empty": "empty",
    "is_unparsed": "no answer found in it",
    "is_truncated": "cut at the limit",
    "is_left_cut": "beginning of the prompt cut off",
}

#: (stage, its scores with their items) of every model, in the run's order.
Models = Sequence[tuple[str, Mapping[str, Measured]]]


def choose_prompts(models: Models, num_prompts: int = NUM_PROMPTS) -> tuple[AnsweredPrompt, ...]:
    """Prompts that the last model answered in words, with the answers of every model that was asked them.

    First those that it lost or gained against the model before it, then those where its answer was cut, then wrong
    ones, then right ones; within each, tasks take turns.
    """
    if not models:
        return ()
    strata: dict[Fate, dict[str, list[tuple[str, str]]]] = {fate: {} for fate in get_args(Fate)}
    for task, found in models[-1][1].items():
        for name, item in found.items.items():
            if isinstance(item.row.get("completion"), str):
                strata[_fate(models, task, name)].setdefault(task, []).append((task, name))
    turns = {fate: _in_turn([sorted(names, key=_digest) for names in strata[fate].values()]) for fate in strata}
    kinds = {
        "flipped": _in_turn([turns["lost"], turns["gained"]]),  # so that a page shows both
        "truncated": turns["truncated"],
        "wrong": turns["wrong"],
        "right": turns["right"],
    }
    shown = {kind: names[: _AT_LEAST[kind]] for kind, names in kinds.items()}
    for kind, names in kinds.items():
        room = num_prompts - sum(map(len, shown.values()))
        shown[kind] = names[: len(shown[kind]) + max(room, 0)]
    chosen = [name for names in shown.values() for name in names][:num_prompts]
    return tuple(_prompt(models, task, name) for task, name in chosen)


def _in_turn(lists: list[list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """The first of each list, then the second of each, and so on."""
    longest = max(map(len, lists), default=0)
    return [names[place] for place in range(longest) for names in lists if place < len(names)]


def _digest(name: tuple[str, str]) -> str:
    return hashlib.sha256("\0".join(name).encode("utf-8", "replace")).hexdigest()


def _fate(models: Models, task: str, name: str) -> Fate:
    last = models[-1][1][task].items[name]
    before = next((item for _, scores in models[-2::-1] if (item := _item(scores, task, name))), None)
    if before is not None and (was := _is_right(before)) != (now := _is_right(last)) and None not in (was, now):
        return "gained" if now else "lost"
    if _is_truncated(last.row):
        return "truncated"
    return "right" if _is_right(last) else "wrong"


def _item(scores: Mapping[str, Measured], task: str, name: str) -> Item | None:
    return scores[task].items.get(name) if task in scores else None


def _is_right(item: Item) -> bool | None:
    """Of the text that is shown: of several samples it is the first. None: partly right, as of several instructions."""
    scores = item.row.get("scores")
    value = scores[0] if isinstance(scores, list) and scores else item.value
    return True if value == 1 else False if value == 0 else None


def _is_truncated(row: Mapping[str, Any]) -> bool:
    # Samples of before say only how many of a prompt's answers came to an end.
    return bool(row.get("is_truncated") or row.get("stop") == "length" or row.get("num_stopped") == 0)


def _prompt(models: Models, task: str, name: str) -> AnsweredPrompt:
    asked = [(subject, item) for subject, scores in models if (item := _item(scores, task, name))]
    row = asked[-1][1].row
    prompt = row.get("prompt")
    return AnsweredPrompt(
        task=task,
        id=_text(row.get("id", "")),
        fate=_fate(models, task, name),
        prompt=_text(prompt) if isinstance(prompt, str) else None,
        target=_text(row.get("target", "")),
        answers=tuple(_answer(subject, item) for subject, item in asked),
    )


def _answer(subject: str, item: Item) -> Answer:
    row, text = item.row, str(item.row.get("completion", ""))
    marks = {mark for mark in _MARKS if row.get(mark) is True}
    marks |= {"is_empty"} if not text.strip() else set()
    marks |= {"is_truncated"} if _is_truncated(row) else set()
    scores = row.get("scores")
    return Answer(
        subject=subject,
        text=_text(text),
        value=item.value,
        is_right=_is_right(item),
        num_samples=len(scores) if isinstance(scores, list) and scores else 1,
        marks=tuple(words for mark, words in _MARKS.items() if mark in marks),
        reason=_text(row.get("reason") or ""),
        num_left_out=int(row.get("num_left_out", 0)),
    )


def _text(value: Any) -> str:
    """Without lone surrogates, which no JSON of UTF-8 holds."""
    return str(value).encode("utf-8", "replace").decode()
