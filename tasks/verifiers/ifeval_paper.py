"""The 25 checks as open-instruct had them at 26b7325 (open_instruct/if_functions.py), bugs included.

Written anew: where the original's regular expressions are quadratic, these give the same answer in linear time. The
bugs are listed in docs/verifiers.md; each is marked here. `verify_response_language` needs a worker (`slow.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable


def keywords(text: str, keyword_list: list[str]) -> bool:
    lower = text.lower()
    return all(keyword.lower() in lower for keyword in keyword_list)


def keyword_frequency(text: str, word: str, N: int) -> bool:
    # Bug: a keyword that is more than one word, or holds an apostrophe or hyphen, is never found.
    return re.findall(r"\b\w+\b", text.lower()).count(word.lower()) == N


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    # Bug: within other words, too ("cat" in "concatenate").
    lower = text.lower()
    return not any(word.lower() in lower for word in forbidden_words)


def letter_frequency(text: str, letter: str, N: int) -> bool:
    return text.count(letter) == N


def paragraph_count(text: str, N: int) -> bool:
    text = "\n".join(line.strip() for line in text.splitlines()).strip()
    paragraphs = text.split("* * *")
    return all(paragraph.strip() for paragraph in paragraphs) and len(paragraphs) == N


def word_count(text: str, N: int, quantifier: str) -> bool:
    return _compare(len(text.split()), N, quantifier, max(round(N * 0.1), 1))


def sentence_count(text: str, N: int, quantifier: str) -> bool:
    # Bug: "!" ends no sentence.
    sentences = re.split(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?)\s", text)
    return _compare(len(sentences), N, quantifier, 1)


def paragraphs(text: str, N: int, first_word: str, i: int) -> bool:
    # Bug: "There" begins "Therefore"; more than two line ends make paragraphs out of nothing.
    found = text.split("\n\n")
    return len(found) == N and -N < i <= N and found[i - 1].strip().startswith(first_word)


def postscript(text: str, postscript_marker: str) -> bool:
    # Bug: the marker may stand anywhere, also at the beginning of the answer.
    place = text.find(postscript_marker)
    return place >= 0 and len(text[place:].strip()) > len(postscript_marker)


def placeholders(text: str, N: int) -> bool:
    return True  # Bug: the original returns a tuple, which is always true


def bullet_points(text: str, N: int) -> bool:
    # Bug: lines in bold (**) and rules (---) count.
    return sum(line.strip().startswith(("*", "-")) for line in text.split("\n")) == N


def title(text: str) -> bool:
    # Bug: an empty title counts.
    for line in text.split("\n"):
        start = line.find("<<")
        if start >= 0 and line.find(">>", start + 2) >= 0:
            return True
    return False


def choice(text: str, options: list[str] | str) -> bool:
    return any(text in option for option in options)  # Bug: operands swapped, so that no text is in every option


def highlighted_sections(text: str, N: int) -> bool:
    # Bug: every two asterisks of a line are a section, also `**`.
    return sum(line.count("*") // 2 for line in text.split("\n")) >= N


def sections(text: str, N: int, section_splitter: str) -> bool:
    # Bug: text before the first section is one more.
    found = text.split(section_splitter)
    return len(found) - (found[0] == "") == N


def json_format(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def repeat_prompt(text: str, original_prompt: str) -> bool:
    return text.startswith(original_prompt)


def two_responses(text: str) -> bool:
    # Bug: one of the two may be empty.
    first, mark, second = text.partition("******")
    return bool(mark) and text.count("******") == 1 and first.strip() != second.strip()


def uppercase(text: str) -> bool:
    return text == text.upper()  # Bug: so is a text without letters


def lowercase(text: str) -> bool:
    return text == text.lower()  # Bug: so is a text without letters


def capital_words(text: str, N: int, quantifier: str) -> bool:
    return _compare(len(re.findall(r"\b[A-Z]+\b", text)), N, quantifier, 0)  # Bug: "around" is exactly


def end(text: str, end_phrase: str) -> bool:
    return text.endswith(end_phrase)


def quotation(text: str) -> bool:
    return text.startswith('"') and text.endswith('"')  # Bug: so does a single mark


def no_commas(text: str) -> bool:
    return "," not in text  # Bug: so is no text at all


def _compare(count: int, N: int, quantifier: str, tolerance: int) -> bool:
    return {"at least": count >= N, "around": abs(count - N) <= tolerance, "at most": count <= N}.get(quantifier, False)


FUNCTIONS: dict[str, Callable[..., bool]] = {
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
