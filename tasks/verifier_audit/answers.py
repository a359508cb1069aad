r"""What an answer says, read anew: the audit compares the verifiers with this, so it uses no code of theirs.

It decides nothing about rewards. It counts how often two gold answers coincide, and whether a hack happens to name the
gold answer (`1 2 3 … 100` does where the answer is 100). Where a rule could be read in two ways it takes both.
"""

from __future__ import annotations

import json
import re
from fractions import Fraction

#: Verifiers that compare one answer with the truth. All others check what the whole text is like.
NUMBERS, EXPRESSIONS, TEXTS = ("gsm8k", "gsm8k_strict"), ("math",), ("exact_match",)
ANSWERS = (*NUMBERS, *EXPRESSIONS, *TEXTS)

_NUMBER = re.compile(r"[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+")
_DROPPED = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;: ]|\\?[$%]|\s|\^\\circ|\^\{\\circ\}")
_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac([0-9])([0-9])(?![0-9])")
_FRACTION = re.compile(r"(-?)(?:\\frac\{([0-9]+)\}\{([0-9]+)\}|([0-9]+)/([0-9]+))")
_VALUE = re.compile(r"-?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]+)?")
_MAX_DIGITS = 400


def family_of(verifier: str) -> str:
    """`math` of `math@paper`."""
    return verifier.partition("@")[0]


def alternatives(ground_truth: str) -> list[str]:
    """The answers that a truth names: those of a JSON list of texts, else the truth itself."""
    try:
        value = json.loads(ground_truth) if ground_truth.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [item.strip() for item in value]
    return [ground_truth.strip()]


def gold_answers(family: str, ground_truth: str) -> list[str]:
    r"""The bare answers of a truth: what stands after the `####` of a worked solution, or in its last `\boxed{}`."""
    found = []
    for text in alternatives(ground_truth):
        if family in NUMBERS:
            text = text.rpartition("####")[2].strip()
        elif family in EXPRESSIONS:
            text = last_boxed(text) or text
        if text:
            found.append(text)
    return found


def gold_keys(family: str, ground_truth: str) -> frozenset[str]:
    """One spelling of every answer that the truth names."""
    keys = (_key(family, answer) for answer in gold_answers(family, ground_truth))
    return frozenset(key for key in keys if key)


def is_value(key: str) -> bool:
    """Whether a key is that of a number: two such keys that differ are two answers."""
    return re.fullmatch(r"-?[0-9]+(?:/[0-9]+)?", key) is not None


def committed_keys(family: str, completion: str) -> frozenset[str]:
    """The answers that a text can be said to give: one, or two where the family's rule may be read in two ways."""
    if family in TEXTS:
        return frozenset({_key(family, completion)})
    if family in NUMBERS:
        # Behind the mark the first number may count, or the last; without the strict rule also the last of all.
        marked = _NUMBER.findall(completion.rpartition("####")[2]) if "####" in completion else []
        last = _NUMBER.findall(completion)[-1:] if family == "gsm8k" else []
        values = {_value(number) for number in (*marked[:1], *marked[-1:], *last)}
        # A sign before it may be a minus or a hyphen.
        return frozenset(values | {_negated(value) for value in values})
    formulas = [piece for piece in completion.split("$") if piece.strip()]
    sentence = completion.rpartition("answer is")[2].partition("\n")[0].partition(". I hope")[0]
    said = [last_boxed(completion), completion, sentence, *(formulas[-2:] if "$" in completion else [])]
    return frozenset(key for one in said if one and (key := _key(family, one)))


def last_boxed(text: str) -> str | None:
    r"""Contents of the last `\boxed{…}`, whose braces may nest; None where there is none, or it never closes."""
    start = text.rfind("\\boxed{")
    depth = 0
    for place in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : place]
    return None


def last_formula(text: str) -> str | None:
    """What stands between the last two `$` of a text."""
    pieces = text.split("$")
    return pieces[-2].strip() or None if len(pieces) >= 3 else None


def _key(family: str, answer: str) -> str:
    if family in TEXTS:
        return answer.strip().replace("\r\n", "\n")
    if family in NUMBERS:
        found = _NUMBER.search(answer)
        if found is None:
            return ""
        value = _value(found.group())
        return _negated(value) if answer[: found.start()].rstrip(" $€£").endswith(("-", "−")) else value
    return _expression(answer)


def _expression(text: str) -> str:
    """A number by its value, else the text without what never changes a value."""
    text = _DROPPED.sub("", _WORDS.sub(r"\1", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")))
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text.replace("{,}", ",").rstrip("."))
    text = re.sub(r"^[a-zA-Z]=", "", text)
    if len(text) > _MAX_DIGITS:
        return text
    if match := _FRACTION.fullmatch(text):
        sign, top, bottom = match[1], match[2] or match[4], match[3] or match[5]
        return str(Fraction(int(sign + top), int(bottom))) if int(bottom) else text
    if text and _VALUE.fullmatch(text) and any(map(str.isdigit, text)):
        return str(Fraction(text.replace(",", "")))
    return text


def _value(digits: str) -> str:
    digits = digits.replace(",", "")
    return str(Fraction(digits)) if len(digits) <= _MAX_DIGITS else digits


def _negated(value: str) -> str:
    return value if value == "0" else value[1:] if value.startswith("-") else f"-{value}"
