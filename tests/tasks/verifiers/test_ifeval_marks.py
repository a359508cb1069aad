"""Marks alone say nothing, and invisible characters hide nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.tasks.verifiers import grade

SOFT_HYPHEN, ZERO_WIDTH_SPACE, GRAPHEME_JOINER, FILLER = "\u00ad", "\u200b", "\u034f", "\u3164"


def outcome(text: str, function: str, **arguments: Any) -> str:
    return grade("ifeval", text, json.dumps({"func_name": function, **arguments})).outcome


@pytest.mark.parametrize(
    ("text", "function", "arguments", "is_right"),
    [
        (". . . . .", "verify_sentence_constraint", {"N": 5, "quantifier": "at least"}, False),
        ("! ! ! !", "verify_sentence_constraint", {"N": 4, "quantifier": "at least"}, False),
        ("! ! ! !", "verify_sentence_constraint", {"N": 4, "quantifier": "at most"}, False),
        ("It is so. ! ? .", "verify_sentence_constraint", {"N": 4, "quantifier": "at least"}, False),
        ("It is so. It is 4!", "verify_sentence_constraint", {"N": 2, "quantifier": "at least"}, True),
        ("- - - -", "validate_word_constraint", {"N": 4, "quantifier": "at least"}, False),
        ("one - two", "validate_word_constraint", {"N": 2, "quantifier": "at most"}, True),
        ("* .\n* .", "verify_bullet_points", {"N": 2}, False),
        ("* a\n* b", "verify_bullet_points", {"N": 2}, True),
        (".\n\n.", "validate_paragraphs", {"N": 2, "first_word": ".", "i": 1}, False),
        ("An answer.\n***\n.", "validate_two_responses", {}, False),
        ("An answer.\n******\n.", "validate_two_responses", {}, False),
        ("Section .\nSection .", "validate_sections", {"N": 2, "section_splitter": "Section"}, False),
        ("Do x. .", "validate_repeat_prompt", {"original_prompt": "Do x."}, False),
        ("Do x. 4", "validate_repeat_prompt", {"original_prompt": "Do x."}, True),
        ("2*3*4", "validate_highlighted_sections", {"N": 1}, False),
        ("2**3**4 is a*b*c", "validate_highlighted_sections", {"N": 1}, False),
        ("*...*", "validate_highlighted_sections", {"N": 1}, False),
        ("*2*3*, **bold**.", "validate_highlighted_sections", {"N": 2}, True),
        ("*a* and (*b*)", "validate_highlighted_sections", {"N": 2}, True),
        ("这是*重点*内容", "validate_highlighted_sections", {"N": 1}, True),
        ("cout << x; y >> z", "validate_title", {}, False),
        ("a<<b>>c", "validate_title", {}, False),
        ("<<...>>", "validate_title", {}, False),
        ("<< >> and an answer", "validate_title", {}, False),
        ("<< >> <<A>>", "validate_title", {}, True),
        ("# << A title >>", "validate_title", {}, True),
        ("Title: << A title >>", "validate_title", {}, True),
        ("I call it <<A title>>, and go on.", "validate_title", {}, True),
        (f"a c{SOFT_HYPHEN}at", "validate_forbidden_words", {"forbidden_words": ["cat"]}, False),
        (f"a c{ZERO_WIDTH_SPACE}at", "validate_forbidden_words", {"forbidden_words": ["cat"]}, False),
        (f"a c{GRAPHEME_JOINER}at", "validate_forbidden_words", {"forbidden_words": ["cat"]}, False),
        (f"a c{FILLER}at", "validate_forbidden_words", {"forbidden_words": ["cat"]}, False),
        ("a dog", "validate_forbidden_words", {"forbidden_words": ["cat"]}, True),
        # Persian writes a joiner within words; it stands in the text and in the keyword, or in one of them.
        ("می‌خواهم", "verify_keywords", {"keyword_list": ["می‌خواهم"]}, True),
        ("میخواهم", "verify_keywords", {"keyword_list": ["می‌خواهم"]}, True),
        (ZERO_WIDTH_SPACE, "validate_no_commas", {}, False),
    ],
)
def test_by_hand(text: str, function: str, arguments: dict[str, Any], is_right: bool) -> None:
    assert outcome(text, function, **arguments) == ("right" if is_right else "wrong")


@given(
    st.text(alphabet=SOFT_HYPHEN + ZERO_WIDTH_SPACE + GRAPHEME_JOINER + FILLER + "\ufe0f", min_size=1),
    st.integers(0, 3),
)
def test_nothing_invisible_hides_a_word(hidden: str, place: int) -> None:
    text = f"A {'cat'[:place]}{hidden}{'cat'[place:]} sat."
    assert outcome(text, "validate_forbidden_words", forbidden_words=["cat"]) == "wrong"
    assert outcome(text, "verify_keyword_frequency", word="cat", N=1) == "right"
