"""The 25 checks without the bugs of the original; what differs, and why, is a table of docs/verifiers.md.

Each takes a text that is not empty and returns whether it keeps the constraint, and what was found. All are linear in
the length of the text. What no reader sees is taken away first: a soft hyphen hides no forbidden word. Whatever has to
say something (a sentence, a word, a title, an answer) needs a letter or a digit: marks alone say nothing.
`validate_response_language` needs a worker (`slow.py`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from smoltulu.tasks.verifiers.verdict import quoted

Found = tuple[bool, str]

_SENTENCE_ENDS = re.compile(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?|!)\s+")
_BULLET = re.compile(r"[*+•-]\s+(?=\S)")
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)
# What may stand before the first word of a line: marks of headings, emphasis, lists, quotes.
_LINE_MARKS = " \t#*_>-\"'“‘("


# Invisible and not of the category Cf: joiners, fillers and selectors of variants (Default_Ignorable_Code_Point).
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]")


def keywords(text: str, keyword_list: list[str]) -> Found:
    lower = text.lower()
    missing = [word for word in keyword_list if word.lower() not in lower]
    return not missing, f"{quoted(missing[0])} is missing" if missing else "all keywords are there"


def keyword_frequency(text: str, word: str, N: int) -> Found:
    return _exactly(N, len(_whole(word.lower()).findall(text.lower())), f"times {quoted(word)}")


def forbidden_words(text: str, forbidden_words: list[str]) -> Found:
    lower = text.lower()
    there = next((word for word in forbidden_words if _whole(word.lower()).search(lower)), None)
    return there is None, "no forbidden word is there" if there is None else f"{quoted(there)} is forbidden"


def letter_frequency(text: str, letter: str, N: int) -> Found:
    return _exactly(N, text.count(letter), f"times the letter {quoted(letter)}")


def paragraph_count(text: str, N: int) -> Found:
    parts = "\n".join(line.strip() for line in text.splitlines()).split("* * *")
    if not all(map(_says_something, parts)):
        return False, "a paragraph is empty"
    return _exactly(N, len(parts), "paragraphs")


def word_count(text: str, N: int, quantifier: str) -> Found:
    found = sum(map(_says_something, text.split()))
    return _compare(found, N, quantifier, max(round(N * 0.1), 1), "words")


def sentence_count(text: str, N: int, quantifier: str) -> Found:
    found = sum(map(_says_something, _SENTENCE_ENDS.split(text)))
    return _compare(found, N, quantifier, 1, "sentences") if found else (False, "there is no sentence")


def paragraphs(text: str, N: int, first_word: str, i: int) -> Found:
    found = [part for part in re.split(r"\n[ \t\r]*\n", text) if _says_something(part)]
    if len(found) != N:
        return _exactly(N, len(found), "paragraphs")
    start = found[i - 1].lstrip().lstrip(_LINE_MARKS).lower()
    word = first_word.strip().lstrip(_LINE_MARKS).lower()
    begins = bool(word) and start.startswith(word) and not start[len(word) : len(word) + 1].isalnum()
    return begins, f"paragraph {i} {'begins' if begins else 'does not begin'} with {quoted(first_word)}"


def postscript(text: str, postscript_marker: str) -> Found:
    before, mark, after = text.rpartition(postscript_marker.strip())
    if not mark:
        return False, f"{quoted(postscript_marker)} is missing"
    if not before.strip(_LINE_MARKS + "\n\r"):
        return False, "nothing stands before the postscript"
    if not _says_something(after):
        return False, "the postscript is empty"
    return True, "a postscript ends the text"


def placeholders(text: str, N: int) -> Found:
    found = 0
    for line in text.split("\n"):
        place = line.find("[")
        while place >= 0 and (end := line.find("]", place)) >= 0:
            found += bool(line[place + 1 : end].strip(" ["))
            place = line.find("[", end)
    return found >= N, f"{found} placeholders, wanted at least {N}"


def bullet_points(text: str, N: int) -> Found:
    lines = (line.strip() for line in text.split("\n"))
    return _exactly(N, sum(bool(_BULLET.match(line)) and _says_something(line) for line in lines), "bullet points")


def title(text: str) -> Found:
    """<<A title>>: its brackets touch it and no other word; or << a title >> alone in its line, behind a label at most.

    So `cout << x; y >> z` and `a<<b>>c` are none.
    """
    lines = text.split("\n")
    found = any(_has_title(line) or _is_title(line) for line in lines)
    return found, "there is a title" if found else "there is no <<title>>"


def _has_title(line: str) -> bool:
    """Whether brackets that touch it are around a title somewhere."""
    place, end = 0, line.find(">>")
    while end >= 0:
        start = line.rfind("<<", place, end)
        inner = line[start + 2 : end] if start >= 0 else ""
        if _says_something(inner) and not inner[0].isspace() and not inner[-1].isspace():
            before, after = line[max(start - 1, 0) : start], line[end + 2 : end + 3]
            if not _in_word(before) and not _in_word(after):
                return True
        place, end = end + 2, line.find(">>", end + 2)
    return False


def _is_title(line: str) -> bool:
    """Whether the line is a title in brackets, and nothing else but marks and a label (`Title:`)."""
    start, end = line.find("<<"), line.rfind(">>")
    if start < 0 or end < start + 2:
        return False
    label = line[:start].rstrip(_LINE_MARKS)
    has_text_around = (_says_something(label) and not label.endswith(":")) or _says_something(line[end + 2 :])
    return _says_something(line[start + 2 : end]) and not has_text_around


def choice(text: str, options: list[str] | str) -> Found:
    """Exactly one option is named: all of them at once are no choice. An option within a longer one does not count.

    In other case only where none is named as it is written: the article in "a B" is no option A.
    """
    assert not isinstance(options, str)
    named = _named(text, options) or _named(text.lower(), [option.lower() for option in options])
    if len(named) == 1:
        return True, f"the option {quoted(named[0])} was taken"
    return False, f"{len(named)} of the options are named, wanted one"


def highlighted_sections(text: str, N: int) -> Found:
    """*Sections* and **sections** that say something; a bold one is one. Those within a word (2*3*4) mark nothing."""
    found = 0
    for line in text.split("\n"):
        marks = [
            match.span()
            for match in re.finditer(r"\*+", line)
            if not (_in_word(line[match.start() - 1 : match.start()]) and _in_word(line[match.end() : match.end() + 1]))
        ]
        is_open = False
        # A piece between two marks is highlighted if it touches both, unless the first closed another one.
        for (_, start), (end, _) in pairwise(marks):
            piece = line[start:end]
            is_open = not is_open and _says_something(piece) and not piece[0].isspace() and not piece[-1].isspace()
            found += is_open
    return found >= N, f"{found} highlighted sections, wanted at least {N}"


def sections(text: str, N: int, section_splitter: str) -> Found:
    """Sections begin with the splitter; an introduction before the first one is none."""
    parts = text.split(section_splitter.strip())
    if not all(map(_says_something, parts[1:])):
        return False, "a section is empty"
    return _exactly(N, len(parts) - 1, "sections")


def json_format(text: str) -> Found:
    fenced = _FENCE.fullmatch(text) if text.startswith("```") and text.endswith("```") else None
    try:
        value = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return False, "the text is no JSON"
    return isinstance(value, (dict, list)), "an object or a list is wanted, in JSON"


def repeat_prompt(text: str, original_prompt: str) -> Found:
    prompt = original_prompt.strip()
    if not text.lower().startswith(prompt.lower()):
        return False, "the text does not begin with the request"
    return _says_something(text[len(prompt) :]), "the request is repeated, an answer has to follow"


def two_responses(text: str) -> Found:
    parts = [part.strip() for part in re.split(r"(?<!\*)\*{6}(?!\*)", text)]
    if len(parts) != 2 or not all(map(_says_something, parts)):
        return False, "there are no two responses with ****** between them"
    return parts[0] != parts[1], "the two responses have to differ"


def uppercase(text: str) -> Found:
    return text.isupper(), "capital letters only are wanted, at least one"


def lowercase(text: str) -> Found:
    return text.islower(), "small letters only are wanted, at least one"


def capital_words(text: str, N: int, quantifier: str) -> Found:
    found = sum(word.isupper() for word in re.findall(r"\b[^\W\d_]+\b", text))
    return _compare(found, N, quantifier, max(round(N * 0.1), 1), "words in capital letters")


def end(text: str, end_phrase: str) -> Found:
    ends = text.endswith(end_phrase.strip())
    return ends, f"the text {'ends' if ends else 'does not end'} with {quoted(end_phrase)}"


def quotation(text: str) -> Found:
    wrapped = len(text) > 2 and text[0] in '"“' and text[-1] in '"”' and _says_something(text)
    return wrapped, f"the text is {'' if wrapped else 'not '}wrapped in double quotation marks"


def no_commas(text: str) -> Found:
    num_commas = sum(map(text.count, ",，、"))
    return num_commas == 0, f"{num_commas} commas"


def _says_something(text: str) -> bool:
    return any(map(str.isalnum, text))


def _in_word(character: str) -> bool:
    """Whether a word goes on at this character. Scripts that put no spaces between words (wide ones) tell nothing."""
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"


def _seen(text: str) -> str:
    """The text without what no reader sees."""
    if text.isascii():
        return text
    return "".join(character for character in _UNSEEN.sub("", text) if unicodedata.category(character) != "Cf")


def _seen_argument(value: Any) -> Any:
    """The same of an argument that is text, or a list of texts, unless nothing would be left of it."""
    if isinstance(value, list):
        return [_seen_argument(item) for item in value]
    return (_seen(value).strip() and _seen(value)) or value if isinstance(value, str) else value


def check(name: str, text: str, arguments: dict[str, Any]) -> Found:
    """Whether a text keeps the constraint `name`, and what was found."""
    text = _seen(text).strip()
    if not text:
        return False, "there is no text"
    return FUNCTIONS[name](text, **{key: _seen_argument(value) for key, value in arguments.items()})


def _exactly(wanted: int, found: int, what: str) -> Found:
    return found == wanted, f"{found} {what}, wanted exactly {wanted}"


def _compare(found: int, wanted: int, quantifier: str, tolerance: int, what: str) -> Found:
    kept = {
        "at least": found >= wanted,
        "around": abs(found - wanted) <= tolerance,
        "at most": found <= wanted,
    }[quantifier]
    return kept, f"{found} {what}, wanted {quantifier} {wanted}"


def _whole(word: str) -> re.Pattern[str]:
    """`word` as a whole word, or as whole words: nothing of a word goes on at its ends."""
    word = word.strip()
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", word) else ""
    return re.compile(before + re.escape(word) + after)


def _named(text: str, options: list[str]) -> list[str]:
    """The options that a text holds as whole words, the longest first; what one has taken is not looked at again."""
    named = []
    for option in sorted(set(options), key=lambda option: (-len(option), option)):
        text, times = _whole(option).subn("\0", text)
        if times:
            named.append(option)
    return named


FUNCTIONS: dict[str, Callable[..., Found]] = {
    "verify_keywords": keywords,
    "verify_keyword_frequency": keyword_frequency,
    "validate_forbidden_words": forbidden_words,
    "verify_letter_frequency": letter_frequency,
    "verify_paragraph_count": paragraph_count,
    "validate_word_constraint": word_count,
    "verify_sentence_constraint": sentence_count,
    "validate_paragraphs": paragraphs,
    "verify_postscript": postscript,
    "validate_placeholders": placeholders,
    "verify_bullet_points": bullet_points,
    "validate_title": title,
    "validate_choice": choice,
    "validate_highlighted_sections": highlighted_sections,
    "validate_sections": sections,
    "validate_json_format": json_format,
    "validate_repeat_prompt": repeat_prompt,
    "validate_two_responses": two_responses,
    "validate_uppercase": uppercase,
    "validate_lowercase": lowercase,
    "validate_frequency_capital_words": capital_words,
    "validate_end": end,
    "validate_quotation": quotation,
    "validate_no_commas": no_commas,
}
