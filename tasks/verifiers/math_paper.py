r"""MATH as Tulu 3 graded it, by its text: `verify_math_sample` of open-instruct at 26b7325 (ground_truth_utils.py).

The answers tried are the last `\boxed{}` and Minerva's sentence; without both, what stands between the last two `$`;
without that, everything. One that Hendrycks' rules make equal to the ground truth is right. The original tried sympy on
LaTeX first, which needs another version of antlr than math-verify does: that part is left out, so a pair that is equal
by value only is wrong here.
"""

from __future__ import annotations

import re

from smoltulu.tasks.verifiers.truths import alternatives
from smoltulu.tasks.verifiers.verdict import Verdict, quoted, right, wrong

_HEADER = "<|assistant|>\n"
_INVALID = "[invalidanswer]"
# Lewkowycz et al. 2022 (Minerva), appendix D.
_SUBSTITUTIONS = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), (r"\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
_REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', "\\dots",
)  # fmt: skip


class _Unchanged(Exception):
    """Where the original's assertion or index fails, it compares the texts as they are."""


def grade_paper(completion: str, ground_truth: str) -> Verdict:
    expected = alternatives(ground_truth)
    text = completion.rpartition(_HEADER)[2].strip()
    for answer in candidates(text):
        if any(is_equivalent(answer, wanted) for wanted in expected):
            return right(f"{quoted(answer)} is {' or '.join(map(quoted, expected[:3]))}, as text")
    return wrong(f"no answer is {' or '.join(map(quoted, expected[:3]))}, as text")


def candidates(text: str) -> list[str]:
    """All answers that the original tries."""
    found = []
    if (boxed := _last_boxed(text)) is not None:
        found.append(boxed)
    minerva = normalised(_minerva(text))
    if minerva != _INVALID:
        found.append(minerva)
    if not found:
        dollars = [match.start() for match in re.finditer(r"\$", text)]
        if len(dollars) > 1:
            found.append(normalised(text[dollars[-2] + 1 : dollars[-1]]))
    return found or [normalised(text)]


def is_equivalent(given: str, expected: str) -> bool:
    """Hendrycks' `is_equiv`."""
    try:
        return _stripped(given) == _stripped(expected)
    except (_Unchanged, IndexError, ValueError):
        return given == expected


def _last_boxed(text: str) -> str | None:
    """`remove_boxed(last_boxed_only_string(text))`; None also where the original's assertions fail."""
    if "\\boxed " in text:
        return text.split("\\boxed ")[-1].split("$")[0]
    start = text.rfind("\\boxed")
    if start < 0 and (start := text.rfind("\\fbox")) < 0:
        return None
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if text[place] == "}" and depth == 0:
            box = text[start : place + 1]
            return box[len("\\boxed{") : -1] if box.startswith("\\boxed{") else None
    return None


def _minerva(text: str) -> str:
    match = re.search(r"Final Answer: The final answer is(.*?). I hope it is correct.", text + "I hope it is correct.")
    return match.group(1).strip() if match else _INVALID


def normalised(answer: str) -> str:
    """Minerva's normal form, character for character."""
    answer = answer.split("=")[-1]
    for before, after in _SUBSTITUTIONS:
        answer = answer.replace(before, after)
    for piece in _REMOVED:
        answer = answer.replace(piece, "")
    # What stands between the first two `$` of a line; the original's expression backtracks.
    answer = "\n".join(f"${line.split('$')[1]}$" if line.count("$") > 1 else line for line in answer.split("\n"))
    for command in ("text", "textbf", "overline"):
        answer = re.sub(r"(\\" + command + r"\{)(.*?)(\})", "\\2", answer)
    answer = re.sub(r"(\\boxed\{)(.*)(\})", "\\2", answer)
    answer = re.sub(r"(frac)([^{])(.)", "frac{\\2}{\\3}", answer)
    answer = re.sub(r"(sqrt)([^{])", "sqrt{\\2}", answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "") if answer.replace(",", "").isdigit() else answer


def _stripped(text: str) -> str:
    """Hendrycks' `strip_string`."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    if "\\text{ " in text:
        pieces = text.split("\\text{ ")
        if len(pieces) != 2:
            raise _Unchanged
        text = pieces[0]
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _with_fractions(_with_roots(text).replace(" ", ""))
    if text == "0.5":
        text = "\\frac{1}{2}"
    return _slash_as_fraction(text)


def _with_roots(text: str) -> str:
    first, *others = text.split("\\sqrt")
    return first + "".join(
        "\\sqrt" + piece if piece[0] == "{" else "\\sqrt{" + piece[0] + "}" + piece[1:] for piece in others
    )


def _with_fractions(text: str) -> str:
    first, *others = text.split("\\frac")
    for piece in others:
        first += "\\frac"
        if piece[0] == "{":
            first += piece
        elif len(piece) < 2:
            return text
        elif piece[1] == "{":
            first += "{" + piece[0] + "}" + piece[1:]
        else:
            first += "{" + piece[0] + "}{" + piece[1] + "}" + piece[2:]
    return first


def _slash_as_fraction(text: str) -> str:
    sides = text.split("/")
    if len(sides) != 2:
        return text
    above, below = int(sides[0]), int(sides[1])  # ValueError: the original compares the texts as they are
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
