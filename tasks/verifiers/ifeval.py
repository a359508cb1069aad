"""Instructions with a constraint that code can check, as in Tulu's rows (allenai/RLVR-GSM-MATH-IF-Mixed-Constraints).

A ground truth is the JSON object `{"func_name": ..., its arguments ...}`: one of 25 functions of open-instruct
(open_instruct/if_functions.py). Arguments that are null are unused; nothing is filled in for one that is missing.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from typing import Any

from smoltulu.tasks.verifiers import ifeval_fixed, ifeval_paper
from smoltulu.tasks.verifiers.names import did_you_mean
from smoltulu.tasks.verifiers.truths import BadTruth, json_object, whole_number
from smoltulu.tasks.verifiers.verdict import Verdict, right, wrong

QUANTIFIERS = ("at least", "around", "at most")
# Words and options of one constraint, and characters of each.
_MAX_WORDS, _MAX_WORD = 50, 200
_PAPER_HEADER = "<|assistant|>\n"


def grade_fixed(completion: str, ground_truth: str) -> Verdict | None:
    """None: detecting a language is left to a worker."""
    name, arguments = read_constraint(ground_truth)
    if name == "validate_response_language":
        return None
    kept, found = ifeval_fixed.check(name, completion, arguments)
    return right(found) if kept else wrong(found)


def grade_paper(completion: str, ground_truth: str) -> Verdict | None:
    """As `verify_ifeval_sample` of open-instruct at 26b7325. None: detecting a language is left to a worker."""
    name, arguments = read_constraint(ground_truth, strict=False)
    if name == "validate_response_language":
        return None
    text = completion.rpartition(_PAPER_HEADER)[2].strip()
    if ifeval_paper.FUNCTIONS[name](text, **arguments):
        return right(f"{name} of the paper accepts it")
    return wrong(f"{name} of the paper refuses it")


def read_constraint(ground_truth: str, strict: bool = True) -> tuple[str, dict[str, Any]]:
    """Function and arguments of a ground truth, each argument of the type that the function needs.

    Args:
        strict: also refuse what every text keeps or none can (an empty list of words, paragraph 3 of 2). Without it,
            only what made the original raise.

    Raises:
        BadTruth: no constraint, an unknown function (with the nearest), a missing, unknown or unfit argument.
    """
    constraint = json_object(ground_truth)
    name = constraint.pop("func_name", None)
    if not isinstance(name, str):
        raise BadTruth("the constraint has no func_name")
    if name not in ARGUMENTS:
        raise BadTruth(f"unknown func_name {name[:60]!r}{did_you_mean(name, ARGUMENTS)}")
    readers = ARGUMENTS[name]
    given = {key: value for key, value in constraint.items() if value is not None}
    if missing := [key for key in readers if key not in given]:
        raise BadTruth(f"{name} lacks its argument {', '.join(missing)}")
    if unknown := sorted(given.keys() - readers.keys()):
        raise BadTruth(f"{name} has no argument {', '.join(unknown)[:80]!r}; it takes {', '.join(readers) or 'none'}")
    try:
        arguments = {key: readers[key](given[key], strict) for key in readers}
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise BadTruth(f"{name}: {error}") from error
    if strict and name == "validate_paragraphs" and not 1 <= arguments["i"] <= arguments["N"]:
        raise BadTruth(f"{name}: there is no paragraph i of N")
    return name, arguments


# Readers of arguments: (value, strict) -> value; ValueError with what is wrong.


def _count(value: Any, strict: bool) -> int:
    return whole_number(value, least=0 if strict else None)


def _text(value: Any, strict: bool) -> str:
    if not isinstance(value, str):
        raise ValueError("an argument that is text in the other rows is none")
    if strict and not value.strip():
        raise ValueError("an argument is empty")
    return value


def _word(value: Any, strict: bool) -> str:
    return _words([_text(value, strict)], strict)[0]


def _mark(value: Any, strict: bool) -> str:
    if value == "":
        raise ValueError("the mark between sections is empty")
    return _text(value, strict)


def _letter(value: Any, strict: bool) -> str:
    if not isinstance(value, str) or len(value) != 1:
        raise ValueError("the letter is no single character")
    return value


def _words(value: Any, strict: bool) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("the words are no list of texts")
    if len(value) > _MAX_WORDS:
        raise ValueError(f"there are more than {_MAX_WORDS:,} words")
    if any(len(item) > _MAX_WORD for item in value):
        raise ValueError(f"a word is longer than {_MAX_WORD} characters")
    if strict and not (value and all(item.strip() for item in value)):
        raise ValueError("a list of words is empty, or a word of it is")
    return value


def _options(value: Any, strict: bool) -> list[str] | str:
    """A list, or a text that lists them: JSON, Python's spelling, or separated by `/`, `|`, `;`, `,` or line ends."""
    if not isinstance(value, str) or not strict:
        return value if isinstance(value, str) else _words(value, strict)
    text = value.strip()
    if text[:1] in "[(" and text[-1:] in "])":
        for read in (json.loads, ast.literal_eval):
            try:
                return _words(list(read(text)), strict)
            except (ValueError, SyntaxError, TypeError):
                continue
        text = text[1:-1]
    for mark in ("\n", "|", ";", "/", ","):
        if len(parts := [part.strip().strip("\"'") for part in text.split(mark)]) > 1:
            return _words([part for part in parts if part], strict)
    raise ValueError("the options are no list of texts")


def _quantifier(value: Any, strict: bool) -> str:
    if strict and value not in QUANTIFIERS:
        raise ValueError(f"the quantifier is none of {', '.join(QUANTIFIERS)}")
    return value if isinstance(value, str) else ""  # which the original refuses for every text


def _language(value: Any, strict: bool) -> str:
    """A code of langdetect, such as `en`; where strict also its English name."""
    text = _text(value, strict)
    if not strict:
        return text
    code = LANGUAGES.get(text.strip().lower(), text.strip().lower())
    if code not in (*LANGUAGES.values(), "zh"):
        raise ValueError(f"unknown language {text[:40]!r}")
    return code


#: What langdetect tells apart: English name -> its code.
LANGUAGES = {
    "afrikaans": "af", "arabic": "ar", "bulgarian": "bg", "bengali": "bn", "catalan": "ca", "czech": "cs",
    "welsh": "cy", "danish": "da", "german": "de", "greek": "el", "english": "en", "spanish": "es", "estonian": "et",
    "persian": "fa", "finnish": "fi", "french": "fr", "gujarati": "gu", "hebrew": "he", "hindi": "hi",
    "croatian": "hr", "hungarian": "hu", "indonesian": "id", "italian": "it", "japanese": "ja", "kannada": "kn",
    "korean": "ko", "lithuanian": "lt", "latvian": "lv", "macedonian": "mk", "malayalam": "ml", "marathi": "mr",
    "nepali": "ne", "dutch": "nl", "norwegian": "no", "punjabi": "pa", "polish": "pl", "portuguese": "pt",
    "romanian": "ro", "russian": "ru", "slovak": "sk", "slovenian": "sl", "somali": "so", "albanian": "sq",
    "swedish": "sv", "swahili": "sw", "tamil": "ta", "telugu": "te", "thai": "th", "tagalog": "tl", "turkish": "tr",
    "ukrainian": "uk", "urdu": "ur", "vietnamese": "vi", "chinese": "zh-cn", "traditional chinese": "zh-tw",
}  # fmt: skip

#: Function -> its arguments and how each is read (open-instruct's `IF_FUNCTIONS_MAP`).
ARGUMENTS: dict[str, dict[str, Callable[[Any, bool], Any]]] = {
    "verify_keywords": {"keyword_list": _words},
    "verify_keyword_frequency": {"word": _word, "N": _count},
    "validate_forbidden_words": {"forbidden_words": _words},
    "verify_letter_frequency": {"letter": _letter, "N": _count},
    "validate_response_language": {"language": _language},
    "verify_paragraph_count": {"N": _count},
    "validate_word_constraint": {"N": _count, "quantifier": _quantifier},
    "verify_sentence_constraint": {"N": _count, "quantifier": _quantifier},
    "validate_paragraphs": {"N": _count, "first_word": _text, "i": _count},
    "verify_postscript": {"postscript_marker": _text},
    "validate_placeholders": {"N": _count},
    "verify_bullet_points": {"N": _count},
    "validate_title": {},
    "validate_choice": {"options": _options},
    "validate_highlighted_sections": {"N": _count},
    "validate_sections": {"N": _count, "section_splitter": _mark},
    "validate_json_format": {},
    "validate_repeat_prompt": {"original_prompt": _text},
    "validate_two_responses": {},
    "validate_uppercase": {},
    "validate_lowercase": {},
    "validate_frequency_capital_words": {"N": _count, "quantifier": _quantifier},
    "validate_end": {"end_phrase": _text},
    "validate_quotation": {},
    "validate_no_commas": {},
}
