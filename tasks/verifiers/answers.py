"""Where the answer of a mathematical text stands. Linear in the length of the text, whatever the text."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_MINERVA = "Final Answer: The final answer is"
_MINERVA_END = ". I hope it is correct"
_CLOSING = {"\\(": "\\)", "\\[": "\\]"}
#: A text without any mark is an answer only if it is as short as one.
_MAX_BARE_CHARACTERS = 200


def final_answer(text: str) -> str | None:
    r"""The one answer that a text gives; None where it gives none.

    The last `\boxed{}` or Minerva's sentence ("Final Answer: The final answer is … I hope it is correct."), whichever
    comes later; without both the last formula between `$`, `\(` or `\[`; without any the whole text if it is short.
    Tulu tried the box and the sentence, and a match of either was right: two answers are a guess, here the last counts.
    """
    box, sentence = text.rfind("\\boxed"), text.rfind(_MINERVA)
    box = max(box, text.rfind("\\fbox"))
    if sentence > box:
        answer = text[sentence + len(_MINERVA) :].partition(_MINERVA_END)[0].partition("\n")[0].strip()
        return answer or None
    if box >= 0:
        # Within the sentence, too: what stands around the box in it is no answer.
        return last_boxed(text)
    formula = _last_formula(text)
    if formula is not None:
        return formula
    bare = text.strip()
    return bare if bare and len(bare) <= _MAX_BARE_CHARACTERS and "\n" not in bare else None


def last_boxed(text: str) -> str | None:
    r"""Contents of the last `\boxed{…}`, whose braces may nest, or of `\boxed 7`; None where the brace never closes."""
    boxes = [match.end() for match in _BOX.finditer(text)]
    if not boxes:
        return None
    start = boxes[-1]
    while start < len(text) and text[start] == " ":
        start += 1
    if text[start : start + 1] != "{":
        # TeX takes one token; people mean what follows up to the end of the formula.
        return re.split(r"[$\n]", text[start:], maxsplit=1)[0].strip() or None
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(mark.group(), 0)
        if depth == 0:
            return text[start + 1 : start + mark.start()]
    return None


def _last_formula(text: str) -> str | None:
    r"""What stands between the last two `$`, or `\(` and `\)`, or `\[` and `\]`; None if nothing does."""
    dollars = [place for place, mark in enumerate(text) if mark == "$" and text[place - 1 : place] != "\\"]
    best, start = None, -1
    while len(dollars) >= 2:
        first, second = dollars[-2], dollars.pop()
        if text[first + 1 : second].strip():  # not the two marks of $$
            best, start = text[first + 1 : second], first
            break
    for opening, closing in _CLOSING.items():
        end = text.rfind(closing)
        begin = text.rfind(opening, 0, max(end, 0))
        if begin > start and text[begin + 2 : end].strip():
            best, start = text[begin + 2 : end], begin
    return best
