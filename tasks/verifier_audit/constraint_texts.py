"""Texts whose worth is known, for one constraint: one that keeps it, one that breaks it, and its known hacks.

They are made from the arguments of the constraint alone, by no code of the verifiers. Where a function's arguments
allow no such text, or one that would be longer than a book, there is none, and the audit says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smoltulu.tasks.verifier_audit.language_samples import SAMPLES

#: Words of the longest text that is made.
_MAX_COUNT = 20_000
#: Sentences that say nothing, each without most letters and words of the others.
_FILLERS = ("An answer is here.", "This is one way to put it.", "Yes, so we go on.", "0 1 2.", "?")


@dataclass(frozen=True)
class Texts:
    """None where no such text could be made.

    hacks  name -> (text, whether it must score wrong). A hack that need not is the rule as it is written: the
           constraint asks for no more, so the text is listed and not held against the verifier
    """

    keeps: str | None = None
    breaks: str | None = None
    hacks: dict[str, tuple[str, bool]] | None = None


def texts_of(function: str, arguments: dict[str, Any]) -> Texts:
    """Of one of the functions of Tulu's RLVR rows. `arguments` as its verifier reads them."""
    make = _MAKERS.get(function)
    return Texts() if make is None else make(**arguments)


def _keywords(keyword_list: list[str]) -> Texts:
    listed = ", ".join(keyword_list)
    return Texts(
        f"An answer in which each word is named: {listed}.",
        _without(keyword_list),
        {"the keywords and nothing else": (listed, False)},
    )


def _keyword_frequency(word: str, N: int) -> Texts:
    if N > _MAX_COUNT:
        return Texts()
    neutral = _without([word])
    keeps = ", ".join([word] * N) if N else neutral
    return Texts(
        keeps,
        ", ".join([word] * (N + 1)),
        {
            "the keyword ten times too often": (" ".join([word] * (N + 10)), True),
            "the keyword and nothing else": (" ".join([word] * N), False),
        },
    )


def _forbidden_words(forbidden_words: list[str]) -> Texts:
    word = forbidden_words[0].strip()
    return Texts(
        _without(forbidden_words),
        f"An answer with {word} in it.",
        {
            "a full stop": (".", False),
            "a forbidden word with a soft hyphen in it": (f"An answer with {word[:1]}\u00ad{word[1:]} in it.", True),
        },
    )


def _letter_frequency(letter: str, N: int) -> Texts:
    if N > _MAX_COUNT or letter.isspace():
        return Texts()
    start = next(text for text in ("Zoom. ", "Hi, we ", "0 ") if letter not in text)
    return Texts(
        start + letter * N, start + letter * (N + 1), {"the letter and nothing else": (letter * N or ".", False)}
    )


def _language(language: str) -> Texts:
    other = "en" if language != "en" else "de"
    return Texts(SAMPLES.get(language), SAMPLES[other], {"numbers only": ("1 2 3 4 5", True)})


def _paragraph_count(N: int) -> Texts:
    if not 0 < N < _MAX_COUNT:
        return Texts()
    mark = "\n* * *\n"
    return Texts(
        mark.join(["An answer."] * N),
        mark.join(["An answer."] * (N + 1)),
        {"marks and no paragraph": (mark.join([""] * N), True)},
    )


def _word_count(N: int, quantifier: str) -> Texts:
    return _counted("word", " ", N, quantifier, tolerance=max(round(N * 0.1), 1))


def _sentence_count(N: int, quantifier: str) -> Texts:
    return _counted("This is one.", " ", N, quantifier, tolerance=1)


def _capital_words(N: int, quantifier: str) -> Texts:
    made = _counted("WORD", " ", N, quantifier, tolerance=max(round(N * 0.1), 1))
    none = "An answer is here."
    keeps = none if N == 0 or quantifier == "at most" else made.keeps
    return Texts(keeps, none if made.breaks == "" else made.breaks, made.hacks)


def _counted(unit: str, mark: str, N: int, quantifier: str, tolerance: int) -> Texts:
    """Texts of so many units; a text of none is no text."""
    if N > _MAX_COUNT:
        return Texts()
    right = {"at least": N, "around": N, "at most": N}[quantifier]
    wrong = {"at least": N - 1, "around": N + 2 * tolerance + 1, "at most": N + 1}[quantifier]
    keeps = mark.join([unit] * max(right, 1)) if right or quantifier == "at least" else None
    return Texts(
        keeps,
        mark.join([unit] * wrong) if wrong >= 0 else None,
        {
            "a full stop": (".", quantifier == "at least" and N > 1),
            "marks alone": (" ".join([".!?"[N % 3]] * N), quantifier != "at most" and 1 + tolerance < N),
        },
    )


def _paragraphs(N: int, first_word: str, i: int) -> Texts:
    if not 1 <= i <= N <= _MAX_COUNT:
        return Texts()

    def with_start(word: str) -> str:
        return "\n\n".join(f"{word if number == i else '0'} is how it goes on." for number in range(1, N + 1))

    other = "Zero" if not first_word.lower().startswith("zero") else "Other"
    return Texts(
        with_start(first_word),
        with_start(other),
        {
            "the first word within a longer one": (with_start(f"{first_word}qq"), True),
            "empty paragraphs": (first_word + "\n\n" * (N - 1), N > 1),
        },
    )


def _postscript(postscript_marker: str) -> Texts:
    return Texts(
        f"An answer.\n\n{postscript_marker} A last word.",
        _without([postscript_marker]),
        {
            "an empty postscript": (f"An answer.\n\n{postscript_marker}", True),
            "a postscript and nothing before it": (f"{postscript_marker} A last word.", True),
        },
    )


def _placeholders(N: int) -> Texts:
    if N > _MAX_COUNT:
        return Texts()
    filled = ["[name]"] * N
    return Texts(
        " and ".join(["An answer", *filled]),
        " and ".join(["An answer", *filled[:-1]]) if N else None,
        {"empty brackets": (" ".join(["An answer", *["[]"] * N]), N > 0)},
    )


def _bullet_points(N: int) -> Texts:
    if N > _MAX_COUNT:
        return Texts()
    points = ["* a point"] * N
    return Texts(
        "\n".join(["An answer.", *points]),
        "\n".join(["An answer.", *points, "* a point"]),
        {
            "rules of asterisks": ("\n".join(["An answer.", *["***"] * N]), N > 0),
            "points without text": ("\n".join(["An answer.", *["*"] * N]), N > 0),
        },
    )


def _title() -> Texts:
    return Texts(
        "<<A title>>\nAn answer.",
        "An answer.",
        {
            "an empty title": ("<<>>\nAn answer.", True),
            "a title of marks": ("<<...>>\nAn answer.", True),
            "shifts and no title": ("An answer: cout << x; y >> z", True),
        },
    )


def _choice(options: list[str] | str) -> Texts:
    if isinstance(options, str):
        return Texts(None, "0", {})
    named = sorted(options, key=lambda option: (-len(option), option))
    lower = {option.strip().lower() for option in options}
    hacks = {"all options at once": (" ".join(options), len(lower) > 1)}
    # One letter that is in an option, and no option: accepted where the two sides of `in` are swapped.
    letter = next((mark for mark in "".join(named).lower() if mark.isalpha() and mark not in lower), None)
    if letter is not None:
        hacks["one letter of an option"] = (letter, True)
    hacks["a full stop"] = (".", "." not in lower)
    return Texts(named[0], _without(options), hacks)


def _highlighted_sections(N: int) -> Texts:
    if N > _MAX_COUNT:
        return Texts()
    parts = ["*a part*"] * N
    return Texts(
        "\n".join(["An answer.", *parts]),
        "\n".join(["An answer.", *parts[:-1]]) if N else None,
        {
            "a flood of asterisks": (f"An answer. {'***' * (2 * N)}", N > 0),
            "products of numbers": ("An answer. " + "2*3*4 " * N, N > 0),
            "empty marks": ("An answer. " + "** " * N, N > 0),
        },
    )


def _sections(N: int, section_splitter: str) -> Texts:
    if not 0 < N < _MAX_COUNT:
        return Texts()
    parts = [f"{section_splitter} {number}\nAn answer." for number in range(1, N + 2)]
    return Texts("\n".join(parts[:N]), "\n".join(parts), {"empty sections": ("\n".join([section_splitter] * N), True)})


def _json_format() -> Texts:
    return Texts('{"answer": "here"}', "An answer.", {"a bare number": ("1", True), "an empty object": ("{}", False)})


def _repeat_prompt(original_prompt: str) -> Texts:
    others = ("An answer without it.", "No.")
    return Texts(
        f"{original_prompt}\n\nAn answer.",
        next(other for other in others if not other.lower().startswith(original_prompt.lower())),
        {
            "the request and nothing else": (original_prompt, True),
            "the request and a full stop": (f"{original_prompt.strip()} .", True),
        },
    )


def _two_responses() -> Texts:
    return Texts(
        "One answer.\n******\nAnother answer.",
        "One answer.",
        {
            "the mark and nothing else": ("******", True),
            "one response and the mark": ("An answer.\n******", True),
            "a response of marks": ("An answer.\n******\n.", True),
            "the same response twice": ("An answer.\n******\nAn answer.", True),
        },
    )


def _upper_case() -> Texts:
    return Texts(
        "AN ANSWER IS HERE.", "AN ANSWER is HERE.", {"no letter": ("1 2 3.", True), "one letter": ("A", False)}
    )


def _lower_case() -> Texts:
    return Texts(
        "an answer is here.", "an answer IS here.", {"no letter": ("1 2 3.", True), "one letter": ("a", False)}
    )


def _end(end_phrase: str) -> Texts:
    other = _without([end_phrase])
    return Texts(
        f"An answer. {end_phrase}",
        f"{end_phrase} {other}" if other else None,
        {"the end and nothing else": (end_phrase, False)},
    )


def _quotation() -> Texts:
    return Texts('"An answer."', "An answer.", {"one mark": ('"', True), "marks and no text": ('""', True)})


def _no_commas() -> Texts:
    return Texts("An answer without one.", "An answer, with one.", {"a full stop": (".", False)})


def _without(words: list[str]) -> str | None:
    """A text in which none of the words stands, whatever their case."""
    return next((text for text in _FILLERS if not any(word.strip().lower() in text.lower() for word in words)), None)


_MAKERS: dict[str, Callable[..., Texts]] = {
    "verify_keywords": _keywords,
    "verify_keyword_frequency": _keyword_frequency,
    "validate_forbidden_words": _forbidden_words,
    "verify_letter_frequency": _letter_frequency,
    "validate_response_language": _language,
    "verify_paragraph_count": _paragraph_count,
    "validate_word_constraint": _word_count,
    "verify_sentence_constraint": _sentence_count,
    "validate_paragraphs": _paragraphs,
    "verify_postscript": _postscript,
    "validate_placeholders": _placeholders,
    "verify_bullet_points": _bullet_points,
    "validate_title": _title,
    "validate_choice": _choice,
    "validate_highlighted_sections": _highlighted_sections,
    "validate_sections": _sections,
    "validate_json_format": _json_format,
    "validate_repeat_prompt": _repeat_prompt,
    "validate_two_responses": _two_responses,
    "validate_uppercase": _upper_case,
    "validate_lowercase": _lower_case,
    "validate_frequency_capital_words": _capital_words,
    "validate_end": _end,
    "validate_quotation": _quotation,
    "validate_no_commas": _no_commas,
}
