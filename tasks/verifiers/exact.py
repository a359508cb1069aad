"""The two plain verifiers: a text that is exactly the answer, and a text of a stated form.

`format` says nothing about whether an answer is right: it is the reward of a control arm, or one part of several.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from smoltulu.tasks.verifiers.answers import last_boxed
from smoltulu.tasks.verifiers.names import did_you_mean
from smoltulu.tasks.verifiers.numbers import last_number
from smoltulu.tasks.verifiers.truths import BadTruth, alternatives
from smoltulu.tasks.verifiers.verdict import Verdict, quoted, right, wrong

#: A template's place for any text that is not blank.
HOLE = "{}"


def grade_exact_match(completion: str, ground_truth: str) -> Verdict:
    """The text is the answer, but for white space around it and the kind of line ends. Case counts."""
    expected = [_lines(text) for text in alternatives(ground_truth)]
    given = _lines(completion)
    if given in expected:
        return right(f"the text is {quoted(given)}")
    return wrong(f"{quoted(given)} is not {' or '.join(map(quoted, expected[:3]))}")


def grade_format(completion: str, ground_truth: str) -> Verdict:
    """The ground truth names a form of `FORMS`, or is a template: the text with `{}` where any text may stand."""
    forms = read_forms(ground_truth)
    text = completion.strip()
    for form in forms:
        if FORMS[form](text) if form in FORMS else _fills(text, form):
            return right(f"the text has the form {quoted(form)}")
    return wrong(f"the text has not the form {' or '.join(map(quoted, forms[:3]))}")


def read_forms(ground_truth: str) -> list[str]:
    """Forms of which any will do. BadTruth for one that is neither known nor a template."""
    forms = alternatives(ground_truth)
    for form in forms:
        if form not in FORMS and not (HOLE in form and form.replace(HOLE, "").strip()):
            raise BadTruth(
                f"unknown form {form[:40]!r}{did_you_mean(form, FORMS)}; known are {', '.join(FORMS)}, and templates, "
                "which are texts with {} where any text may stand"
            )
    return forms


def _lines(text: str) -> str:
    return text.strip().replace("\r\n", "\n").replace("\r", "\n")


def _number(text: str) -> bool:
    return last_number(text) is not None


def _hash(text: str) -> bool:
    return bool(re.search(r"####[ \t]*[-+$]{0,2}\.?[0-9]", text.rpartition("\n")[2]))


def _boxed(text: str) -> bool:
    return bool((last_boxed(text) or "").strip()) and text.count("\\boxed") == 1


def _think_answer(text: str) -> bool:
    """`<think>…</think><answer>…</answer>` and nothing around it, each once and not blank."""
    marks = ("<think>", "</think>", "<answer>", "</answer>")
    if any(text.count(mark) != 1 for mark in marks) or not text.startswith(marks[0]) or not text.endswith(marks[3]):
        return False
    thought, _, rest = text[len(marks[0]) : -len(marks[3])].partition(marks[1])
    between, mark, answer = rest.partition(marks[2])
    return bool(mark and thought.strip() and answer.strip() and not between.strip())


def _json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False


#: Name -> whether a text has that form.
FORMS: dict[str, Callable[[str], bool]] = {
    "number": _number,  # a number somewhere: what `gsm8k` can read
    "hash": _hash,  # the last line is `#### number`
    "boxed": _boxed,  # one \boxed{} that is closed and not empty
    "think_answer": _think_answer,
    "json": _json,
}


def _fills(text: str, template: str) -> bool:
    """Whether the text is the template with text that is not blank in every hole. The pieces are looked for in turn."""
    first, *pieces, last = template.split(HOLE)
    if not text.startswith(first):
        return False
    place = len(first)
    for piece in pieces:
        # Two holes side by side are one.
        end = text.find(piece, place + 1) if piece else place
        if end < place or (piece and not text[place:end].strip()):
            return False
        place = end + len(piece)
    return text.endswith(last) and bool(text[place : len(text) - len(last)].strip())
