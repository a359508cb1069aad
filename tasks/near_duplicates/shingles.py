"""The set of shingles of a text, and how alike two sets are. Pure.

Broder, On the resemblance and containment of documents (1997).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Set
from typing import Any, Literal

from smoltulu.tasks.data.rows import texts_of

#: Scripts without blanks between words: every character is a word.
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
#: Marks that belong to a word, which \w leaves out: combining accents, vowel signs of Hebrew, Arabic and India.
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0900-\u0dff"
#: A sign of arithmetic is a word, or `x + 1` would be the same as `x / 1`. Repeated ones are markup or rules.
_SIGN = r"(?<![*=<>+/^%|&~])[*=<>+/^%|&~](?![*=<>+/^%|&~])|[±×÷√∑∫∞≤≥≠]|-(?=\d)|(?<=[\w)] )-(?= [\w(])"
_WORD_ASCII = re.compile(rf"[a-z0-9]+|{_SIGN}")
_WORD = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}_])[\w{_MARKS}])+|{_SIGN}")


def compared_text(row: Mapping[str, Any], which: Literal["user", "all"]) -> str:
    """The turns of a normalised row that are compared, joined by line feeds."""
    return "\n".join(text for role, text in texts_of(row) if which == "all" or role == which)


def plain_words(text: str) -> str:
    """The words of a text, folded to one case and form, with one blank between them.

    Case, punctuation, blanks and markup make no difference. Signs of arithmetic do.
    """
    if text.isascii():
        return " ".join(_WORD_ASCII.findall(text.lower()))
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def shingles(words: str, unit: Literal["words", "characters"], size: int) -> list[str]:
    """Runs of `size` words or characters of what `plain_words` gave; a shorter text is one shingle. Repeats stay."""
    if unit == "characters":
        return [words[start : start + size] for start in range(max(len(words) - size, 0) + 1)] if words else []
    parts = words.split(" ")
    if len(parts) <= size:
        return [words] if words else []
    if size == 3:  # the default, twice as fast
        return [f"{a} {b} {c}" for a, b, c in zip(parts, parts[1:], parts[2:], strict=False)]
    return [" ".join(parts[start : start + size]) for start in range(len(parts) - size + 1)]


def jaccard(one: Set[str], other: Set[str]) -> float:
    """Size of what two sets share over the size of what they have together; 0 for two empty ones."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if shared else 0.0
