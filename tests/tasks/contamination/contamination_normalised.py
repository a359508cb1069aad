"""The mode `normalised` in plain Python, from the rule in docs/contamination.md: `unicodedata`, `html`, `re`."""

from __future__ import annotations

import html
import re
import unicodedata
from functools import cache
from typing import NamedTuple

from smoltulu.tasks.contamination.build import WEAK_TERMS
from smoltulu.tasks.contamination.normal_form import (
    BLOCK_TAGS,
    BY_CHARACTER,
    IGNORABLE,
    INLINE_TAGS,
    LATEX_LOOKS,
    LATEX_NRT,
    LATEX_SIZED,
    QUOTE_LETTERS,
    ZERO_WIDTH_POINTS,
)
from tests.tasks.contamination.contamination_brute_force import full_score

INVISIBLE = "\u034f"


class Character(NamedTuple):
    """One character of the text as it is read, and the characters of the source that it stands for."""

    text: str
    begin: int
    end: int


def readings(text: str) -> list[list[tuple[str, int, int]]]:
    """Terms of a text with their bounds in it: as it is read first, and as it can be read otherwise."""
    found = []
    for zero_width in ("", " "):
        characters = drawn(text, zero_width)
        for _ in range(4):
            characters, is_changed = unescape(characters)
            if not is_changed:
                break
        characters = without_markup(characters)
        if zero_width:
            blank = [c._replace(text=" " if kind(c.text) == "zero width" else c.text) for c in characters]
            unnumbered = without_line_numbers(blank)
            found += [terms(blank), terms(joined_words(blank)), terms(unnumbered), terms(joined_words(unnumbered))]
        else:
            found.append(terms(characters))
    return found


def drawn(text: str, zero_width: str) -> list[Character]:
    """Characters that are drawn, full-width ASCII as ASCII; what is not drawn belongs to the one before."""
    kept = []
    for i, c in enumerate(text):
        c = chr(ord(c) - 0xFEE0) if "\uff01" <= c <= "\uff5e" else c
        c = zero_width if kind(c) == "zero width" else c
        is_break = c == "\u00ad" and text[i + 1 : i + 2] in tuple(" \t\n\v\f\r")
        if c and (kind(c) != "drop" or is_break):
            kept.append((c, i))
    begins = [begin for _, begin in kept] + [len(text)]
    return [Character(c, begin, end) for (c, begin), end in zip(kept, begins[1:], strict=True)]


def valid(point: int) -> str:
    """The character of a code point, U+FFFD for what is none."""
    return chr(point) if 0 < point <= 0x10FFFF and not 0xD800 <= point < 0xE000 else "\ufffd"


_BYTE = re.compile(r"%([0-9A-Fa-f]{2})|\\+x([0-9A-Fa-f]{2})")
_PAIR = re.compile(r"\\+u([dD][89abAB][0-9A-Fa-f]{2})\\+u([dD][c-fC-F][0-9A-Fa-f]{2})")
_UNICODE = re.compile(r"\\+(?:u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}|U([0-9A-Fa-f]{8}))")
_ENTITY = re.compile(r"&(?:amp;)*(?:#[xX]([0-9A-Fa-f]{1,8})|#([0-9]{1,8})|([A-Za-z0-9]{1,31}));")
_AND = re.compile(r"&(?:amp;)+")
_BACKSLASHES = re.compile(r"\\+([A-Za-z]*)")


def escape_at(text: str, i: int) -> tuple[str, int] | None:
    """(what the escape at `i` stands for, its length), None where there is none."""
    if text[i] == "&":
        if found := _ENTITY.match(text, i):
            number = int(found[1], 16) if found[1] else int(found[2]) if found[2] else None
            if number is not None:
                return (html.unescape(f"&#{number};") if 128 <= number < 160 else valid(number)), len(found[0])
            if f"{found[3]};" in html.entities.html5:
                return html.entities.html5[f"{found[3]};"], len(found[0])
        found = _AND.match(text, i)
        return ("&", len(found[0])) if found else None
    if text[i] == "\\":
        if found := _PAIR.match(text, i):
            high, low = (int(half, 16) for half in found.groups())
            return chr(0x10000 + ((high - 0xD800) << 10) + low - 0xDC00), len(found[0])
        if found := _UNICODE.match(text, i):
            return valid(int(found[1] or found[2] or found[3], 16)), len(found[0])
    found, given, end = _BYTE.match(text, i), bytearray(), i
    while found and len(given) < 4:
        given.append(int(found[1] or found[2], 16))
        end = found.end()
        try:
            return valid(ord(given.decode())), end - i
        except UnicodeDecodeError:
            found = _BYTE.match(text, end)
    if given and text[i] == "\\":
        return valid(given[0]), _BYTE.match(text, i).end() - i
    return None


def unescape(characters: list[Character]) -> tuple[list[Character], bool]:
    """The outermost escapes undone; whether there were any that may have hidden others."""
    text = "".join(c.text for c in characters)
    out, i, is_changed = [], 0, False
    while i < len(text):
        begin, length, new = characters[i].begin, 1, text[i]
        found = escape_at(text, i) if text[i] in "&%\\" else None
        if found:
            new, length = found
            is_changed = True
        elif text[i] == "\\":
            run = _BACKSLASHES.match(text, i)
            length = len(run[0]) - len(run[1])
            if run[1][:1] in ("n", "r", "t") and run[1] not in LATEX_NRT.split():
                new, length = {"n": "\n", "r": "\r", "t": "\t"}[run[1][0]], length + 1
        out += [Character(c, begin, characters[i + length - 1].end) for c in new]
        i += length
    return out, is_changed


_VALUE = r"(?:\"[^\"<]*\"|'[^'<]*'|(?![\"'])[^ \t-\r<>=]+)"
_ATTRIBUTE = rf"[ \t-\r]+[A-Za-z:_-][A-Za-z0-9:._-]*={_VALUE}"
_TAG = re.compile(rf"</?([A-Za-z0-9]{{1,31}})((?:{_ATTRIBUTE})*)[ \t-\r]*/?>")
_ADDRESS = r"(?=/|#|\./|htt|www|mai...:)(?:[^ \t-\r()\[\]<>]|\([^ \t-\r()\[\]<>]*\))*"
_TITLE = r"(?:[ \t-\r]+(?:\"[^\"\[\]]*\"|'[^'\[\]]*'))?"
_TARGET = re.compile(rf"\]\((?:<{_ADDRESS}>|{_ADDRESS}){_TITLE}\)", re.DOTALL)
_LOOKS = set(LATEX_LOOKS.lower().split())
_COMMAND = re.compile(r"\\([A-Za-z]+)")


def without_markup(characters: list[Character]) -> list[Character]:
    """Tags, targets of links and LaTeX commands of looks as blanks, or as a character that is dropped."""
    text, i = "".join(c.text for c in characters), 0
    out = list(text)
    while i < len(text):
        end, fill = i + 1, text[i]
        if (found := _TAG.match(text, i)) and found[1].lower() in (*INLINE_TAGS.split(), *BLOCK_TAGS.split()):
            end, fill = found.end(), INVISIBLE if found[1].lower() in INLINE_TAGS.split() else " "
        elif (found := _TARGET.match(text, i)) or ((found := _COMMAND.match(text, i)) and found[1].lower() in _LOOKS):
            end, fill = found.end(), " "
        elif found and found[1].lower() in LATEX_SIZED.split():
            end, fill = i + 2, " "
        out[i:end] = fill * (end - i)
        if fill == " " and text[i] == "<":
            out[i] = "\n"  # a block begins a line
        i = end
    return [c._replace(text=new) for c, new in zip(characters, out, strict=True)]


_BROKEN = re.compile("[-\u00ad\u2010\u2011][ \t\r]*(?:\n|(?<=\r))")


def joined_words(characters: list[Character]) -> list[Character]:
    """Words that a hyphen breaks at the end of a line made whole."""
    text = "".join(c.text for c in characters)
    out = list(text)
    i = 0
    last = "gap"
    while i < len(text):
        end = i
        if (found := _BROKEN.match(text, i)) and last == "letter":
            end = found.end()
            while end < len(text) and text[end] not in "\n\r" and kind(text[end]) == "gap":
                end += 1
            if end == len(text) or kind(text[end]) != "letter":
                end = i
        if end > i:
            out[i:end] = INVISIBLE * (end - i)
            i = end
            continue
        last = last if kind(text[i]) == "drop" else kind(text[i])
        i += 1
    return [c._replace(text=new) for c, new in zip(characters, out, strict=True)]


_OTHER = r"A-Za-z0-9\x80-\U0010ffff"
_LINE_NUMBER = re.compile(rf"([^{_OTHER}]{{0,32}})([0-9]{{1,6}})(?:(?=[\u3001\u3002])|(?![{_OTHER}]))")


def without_line_numbers(characters: list[Character]) -> list[Character]:
    """Numbers that begin lines and count on taken out."""
    text = "".join(c.text for c in characters)
    out = list(text)
    before, digits = -9, (0, 0)
    for line in re.finditer(r"[^\n\r]*[\n\r]?", text):
        number = re.match(
            r"([^A-Za-z0-9\x80-\U0010ffff]{0,32})([0-9]{1,6})(?:(?=[\u3001\u3002])|(?![A-Za-z0-9\x80-\U0010ffff]))",
            line[0],
        )
        if number:
            here = (line.start() + number.start(2), line.start() + number.end(2))
            if int(number[2]) == before + 1:
                for first, end in (digits, here):
                    out[first:end] = " " * (end - first)
            before, digits = int(number[2]), here
    return [c._replace(text=new) for c, new in zip(characters, out, strict=True)]


@cache
def kind(character: str) -> str:
    """What a character of the text does: gap, letter, digit, single (a term of its own), drop, zero width, several."""
    if ord(character) in ZERO_WIDTH_POINTS:
        return "zero width"
    folded = fold(character)
    if not folded:
        return "drop"
    if all(what == "gap" for _, what in folded):
        return "gap"
    return folded[0][1] if len(folded) == 1 else "several"


@cache
def fold(character: str) -> list[tuple[str, str]]:
    """NFKD, case folded, until nothing changes: its characters and what each is, marks and format characters gone."""
    before = ""
    while character != before:
        before, character = character, unicodedata.normalize("NFKD", character).casefold()
    out = []
    for c in character:
        category = unicodedata.category(c)
        is_mark = category == "Me" or (category == "Mn" and unicodedata.combining(c) != 0)
        if ord(c) in IGNORABLE or 0xE0000 <= ord(c) < 0xE1000 or category == "Cf" or is_mark:
            continue
        if (category[0] not in "LNM" or ord(c) in QUOTE_LETTERS) and not _is_coming_han(ord(c)):
            out.append((c, "gap"))
        elif any(first <= ord(c) <= last for first, last in BY_CHARACTER):
            out.append((c, "single"))
        else:
            out.append((c, "digit" if category[0] == "N" else "letter"))
    return out


def _is_coming_han(point: int) -> bool:
    """Kept for Han, though Unicode has not given all of them away."""
    return (
        0x3400 <= point < 0x4DC0 or 0x4E00 <= point < 0xA000 or 0x20000 <= point < 0x2F800 or 0x30000 <= point < 0x323B0
    )


def terms(characters: list[Character]) -> list[tuple[str, int, int]]:
    """Runs of letters, runs of digits and single characters, each with its bounds in the source."""
    out: list[list] = []
    last = "gap"
    is_open = False  # marks of a term's last character belong to it
    for c in characters:
        if kind(c.text) in ("drop", "zero width"):
            is_open = is_open and kind(c.text) == "drop" and c.text != INVISIBLE
            if is_open:
                out[-1][2] = c.end
            continue
        for folded, what in fold(c.text) or [("", "gap")]:
            if what != "gap":
                if what == last and what != "single":
                    out[-1][0] += folded
                    out[-1][2] = c.end
                else:
                    out.append([folded, c.begin, c.end])
            is_open = what != "gap"
            last = what
    return [tuple(term) for term in out]


def occurrence(turn: str, field: str) -> tuple[int, int] | None:
    """Bounds in the turn of the first run of the field's terms, in the first reading that has one."""
    wanted = [term for term, _, _ in readings(field)[0]]
    for reading in readings(turn):
        found = [term for term, _, _ in reading]
        for at in range(len(found) - len(wanted) + 1):
            if wanted and found[at : at + len(wanted)] == wanted:
                return reading[at][1], reading[at + len(wanted) - 1][2]
    return None


def is_most_of_its_lines(turn: str, bounds: tuple[int, int] | None) -> bool:
    """Whether a passage has more than half of the letters and digits of its lines, in bytes."""
    if bounds is None:
        return False
    begin, end = bounds
    first = max(turn.rfind(c, 0, begin) for c in "\n\r") + 1
    last = min((turn.find(c, end) for c in "\n\r" if c in turn[end:]), default=len(turn))

    def count(text: str) -> int:
        return sum(len(c.encode()) for c in text if ord(c) >= 0x20000 or unicodedata.category(c)[0] in "LNM")

    return count(turn[first:begin]) + count(turn[end:last]) < count(turn[begin:end])


def holds(turn: str, field: str) -> bool:
    """Whether the turn holds the field: as a run of terms, and where it has few, as in full mode or standing alone."""
    wanted = [term for term, _, _ in readings(field)[0]]
    if occurrence(turn, field) is None or len(wanted) >= WEAK_TERMS or full_score((field,), turn):
        return occurrence(turn, field) is not None
    if not any(len(term.encode()) > 1 and not term.encode().isdigit() for term in wanted):
        return False
    return any(is_most_of_its_lines(piece, occurrence(piece, field)) for piece in (turn, *re.split("[\n\r]", turn)))
