"""Takes code, formulas and addresses out of a text, and says why no prose is left. Pure.

Language detectors answer on any bytes: without this, code and formulas are the largest error of a language table.
The rules are heuristics. They drop a line only where two signs of code meet or where letters are in the minority.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from smoltulu.schemas.languages import Undetermined

_FENCED = re.compile(r"(```|~~~).*?(?:\1|\Z)", re.DOTALL)  # an open fence reaches to the end
_INLINE_CODE = re.compile(r"`[^`\n]+`")
_MARKUP = re.compile(r"</?[A-Za-z][^<>\n]{0,200}>")
_FORMULA = re.compile(
    r"\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|\\begin\{(\w+\*?)\}.*?\\end\{\1\}"
    r"|\$(?!\s)[^$\n]{1,400}?(?<!\s)\$(?!\d)",  # not "$5 and $6"
    re.DOTALL,
)
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[^{}\n]*\})*")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+|[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")

#: Words that begin a line of code, and also sentences: a sign of code must follow.
_CODE_START = re.compile(
    r"\s*(?:def|class|import|from|return|if|elif|else|for|while|try|except|function|var|let|const|public|private|static"
    r"|void|int|float|double|char|string|using|namespace|package|print|echo|select|insert|update|create)\b",
    re.IGNORECASE,
)
_CODE_SIGN = re.compile(r"[{}\[\]=<>]|\w\(|\)\s*[:;]?\s*$|;\s*$|::|:\s*$")
_CODE_LINE = re.compile(
    r"\s*(?:#include\b|#!/|//|/\*|\*/|<\?|<!--|@\w+\s*(?:\(|$)|>>> |\$ \w|import [\w.]+(?: as \w+)?\s*;?\s*$"
    r"|from [\w.]+ import |[\w.\[\]\"']+ *(?:=|\+=|-=|:=) *\S.*|[})\];,\s]+$)"
)
_CODE_OPERATOR = re.compile(r"->|=>|==|!=|\+=|&&|\|\||::|\w\(\)|\w\[\w+\]|[{};]\s*$")
#: Four words in a row: a line of code has brackets and operators between names.
_PLAIN_WORDS = re.compile(r"(?:\b[A-Za-z']{1,30},? ){3}[A-Za-z']{1,30}\b(?![(\[_=.])")
_DIGIT_OR_OPERATOR = re.compile(r"[\d+*/=<>^≤≥≠×÷√∑∫∞±%-]")


def judge(text: str, min_letters: int, max_characters: int) -> tuple[str, Undetermined | None]:
    """The prose of `text`, at most `max_characters` of it, and why it cannot be judged; None where it can.

    Prose is looked for in the first 20 times as many characters, so that one huge row costs no more than others.
    """
    text = text[: 20 * max_characters]
    kept, code, maths = split_prose(text)
    if num_letters(kept, min_letters) >= min_letters:
        return kept[:max_characters], None
    if max(code, maths) == 0 or num_letters(kept, min_letters) > code + maths:
        return "", "too_short"
    return "", "code" if code >= maths else "maths"


def split_prose(text: str) -> tuple[str, int, int]:
    """(prose, characters of code, characters of maths taken out); blanks are not counted."""
    taken = {"code": 0, "maths": 0}

    def count(what: str, removed: str) -> str:
        taken[what] += sum(not character.isspace() for character in removed)
        return " "

    def take(what: str, pattern: re.Pattern[str], words: str) -> str:
        return pattern.sub(lambda match: count(what, match.group()), words)

    if "`" in text or "~~~" in text:
        text = take("code", _INLINE_CODE, take("code", _FENCED, text))
    if "\\" in text or "$" in text:
        text = take("maths", _LATEX_COMMAND, take("maths", _FORMULA, text))
    if "<" in text:
        text = take("code", _MARKUP, text)
    if "://" in text or "www." in text or "@" in text:
        text = _ADDRESS.sub(" ", text)
    lines = []
    for line in filter(None, map(str.strip, text.splitlines())):
        what = _kind_of_line(line)
        if what is None:
            lines.append(line)
        else:
            count(what, line)
    return "\n".join(lines), taken["code"], taken["maths"]


def _kind_of_line(line: str) -> Literal["code", "maths"] | None:
    """`code`, `maths`, or None for prose."""
    if _is_formula(line) and not (line.isascii() and _CODE_OPERATOR.search(line)):
        return "maths"
    if not line.isascii():
        return None
    signs = (
        _CODE_LINE.match(line) or _CODE_OPERATOR.search(line) or (_CODE_START.match(line) and _CODE_SIGN.search(line))
    )
    return "code" if signs and not _PLAIN_WORDS.search(line) else None


def _is_formula(line: str) -> bool:
    """Letters are in the minority, and digits or operators among the rest; no word of more than five letters."""
    dense = re.sub(r"\s", "", line)
    letters = sum(_is_letter(character) for character in dense)
    return (
        2 * letters < len(dense)
        and _DIGIT_OR_OPERATOR.search(dense) is not None
        and re.search(r"[A-Za-z]{6}", line) is None
    )


def num_letters(text: str, enough: int) -> int:
    """Letters and their marks, counted up to `enough`; Han, Kana and Hangul carry as much as three letters."""
    total = 0
    for character in text:
        if _is_letter(character):
            total += 3 if "\u3040" <= character <= "\u9fff" or "\uac00" <= character <= "\ud7a3" else 1
            if total >= enough:
                return total
    return total


def _is_letter(character: str) -> bool:
    # Vowel signs of Hindi and Thai are marks (M), which str.isalpha() refuses.
    return character.isalpha() or unicodedata.category(character)[0] == "M"
