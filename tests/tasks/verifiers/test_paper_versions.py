"""Every documented bug of open-instruct at 26b7325: `paper` has it, `fixed` has not. Cases were run on the original."""

from __future__ import annotations

import json
from typing import Any

import pytest

from smoltulu.tasks.verifiers import fault_of_truth, verify
from smoltulu.tasks.verifiers.ifeval import ARGUMENTS


@pytest.mark.parametrize(
    ("completion", "ground_truth", "paper", "fixed"),
    [
        ("So the answer is 18.", "18", 1.0, 1.0),
        ("So the answer is -5", "5", 1.0, 0.0),  # the sign is read of decimals only
        ("So the answer is -5", "-5", 0.0, 1.0),
        ("So the answer is -5.5", "-5.5", 1.0, 1.0),
        ("So the answer is 18.00", "18", 0.0, 1.0),  # texts are compared
        ("So the answer is 1,000", "1,000", 0.0, 1.0),  # the answer loses its comma, the truth does not
        ("So the answer is 1,000", "1000", 1.0, 1.0),
        ("either 1,2", "12", 1.0, 0.0),  # any comma between digits is dropped
        ("eighteen", "eighteen", 1.0, None),  # without a number the whole text
        ("99<|assistant|>\n18", "18", 1.0, 1.0),
        ("18<|assistant|>\nnone", "18", 0.0, 1.0),  # only the text after a header that the model may write itself
    ],
)
def test_gsm8k(completion: str, ground_truth: str, paper: float, fixed: float | None) -> None:
    assert verify("gsm8k@paper", completion, ground_truth) == paper
    assert verify("gsm8k", completion, ground_truth) == fixed


@pytest.mark.parametrize(
    ("completion", "ground_truth", "paper", "fixed"),
    [
        (r"\boxed{\frac12}", r"\frac{1}{2}", 1.0, 1.0),
        (r"\boxed{1/2}", r"\frac{1}{2}", 1.0, 1.0),
        (r"\boxed{-1/2}", r"-\frac{1}{2}", 0.0, 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0, 1.0),
        (r"\boxed{0.25}", r"\frac{1}{4}", 0.0, 1.0),
        (r"\boxed{x = 5}", "5", 1.0, 1.0),
        (r"\boxed{5\text{ cm}}", "5", 1.0, 1.0),
        (r"\boxed{5\text{ cm}}", r"5\text{ m}", 1.0, 0.0),  # units are dropped, whichever they are
        (r"\boxed{\sqrt3}", r"\sqrt{3}", 1.0, 1.0),
        (r"\boxed{50\%}", "50", 1.0, 1.0),
        (r"\boxed{1 2}", "12", 1.0, 0.0),
        (r"\boxed{1000}", "1,000", 0.0, 1.0),
        (r"\boxed{(1, 2)}", "(1,2)", 1.0, 1.0),
        (r"\boxed{2,1}", "1,2", 0.0, 1.0),
        # two answers are tried: the box, and Minerva's sentence
        (r"\boxed{7} Final Answer: The final answer is $8$. I hope it is correct.", "7", 1.0, 0.0),
        (r"\boxed{7} Final Answer: The final answer is $8$. I hope it is correct.", "8", 1.0, 1.0),
        ("the value is $4$ or $ 5 $", "5", 1.0, 1.0),
        ("5 square feet", "5", 1.0, 1.0),
        ("", r"\text{ cm}", 1.0, 0.0),  # nothing, where the unit is all of the truth
    ],
)
def test_math(completion: str, ground_truth: str, paper: float, fixed: float | None) -> None:
    assert verify("math@paper", completion, ground_truth) == paper
    assert verify("math", completion, ground_truth) == fixed


def ifeval(version: str, completion: str, name: str, **arguments: Any) -> float | None:
    return verify(f"ifeval@{version}", completion, json.dumps({"func_name": name, **arguments}))


@pytest.mark.parametrize(
    ("name", "arguments", "completion", "paper", "fixed"),
    [
        ("validate_placeholders", {"N": 2}, "no placeholder at all", 1.0, 0.0),  # a tuple is true
        ("validate_placeholders", {"N": 2}, "[name] and [street]", 1.0, 1.0),
        ("validate_placeholders", {"N": 1}, "[] and [ ]", 1.0, 0.0),
        ("validate_choice", {"options": ["yes it is", "no"]}, "yes", 1.0, 0.0),  # operands swapped
        ("validate_choice", {"options": ["yes it is", "no"]}, "Well, yes it is.", 0.0, 1.0),
        ("validate_choice", {"options": ["yes", "no"]}, "yes and no", 0.0, 0.0),  # all at once
        ("validate_choice", {"options": ["A", "B", "C"]}, "I believe the answer is B, as a guess", 0.0, 1.0),
        ("validate_choice", {"options": ["no", "not sure"]}, "I am not sure", 0.0, 1.0),
        ("validate_frequency_capital_words", {"N": 5, "quantifier": "around"}, "AA BB CC DD", 0.0, 1.0),
        ("validate_frequency_capital_words", {"N": 5, "quantifier": "around"}, "AA BB CC DD EE", 1.0, 1.0),
        ("validate_frequency_capital_words", {"N": 5, "quantifier": "around"}, "AA BB", 0.0, 0.0),
        ("verify_sentence_constraint", {"N": 3, "quantifier": "at least"}, "One! Two! Three!", 0.0, 1.0),
        ("verify_sentence_constraint", {"N": 2, "quantifier": "at most"}, "One! Two! Three!", 1.0, 0.0),
        ("verify_keyword_frequency", {"word": "don't", "N": 1}, "I don't know", 0.0, 1.0),
        ("verify_keyword_frequency", {"word": "New York", "N": 2}, "New York, New York", 0.0, 1.0),
        ("validate_forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", 0.0, 1.0),
        ("validate_forbidden_words", {"forbidden_words": ["cat"]}, "a Cat!", 0.0, 0.0),
        ("validate_paragraphs", {"N": 2, "i": 2, "first_word": "There"}, "One\n\nTherefore", 1.0, 0.0),
        ("validate_paragraphs", {"N": 2, "i": 2, "first_word": "there"}, "One\n\nThere it is", 0.0, 1.0),
        ("validate_paragraphs", {"N": 2, "i": 2, "first_word": "There"}, "One\n\n\n\nThere it is", 0.0, 1.0),
        ("verify_postscript", {"postscript_marker": "P.S."}, "P.S. all of the answer", 1.0, 0.0),
        ("verify_postscript", {"postscript_marker": "P.S."}, "An answer.\n\nP.S. One more", 1.0, 1.0),
        ("verify_bullet_points", {"N": 1}, "**Bold**\n* one\n---", 0.0, 1.0),
        ("validate_title", {}, "<<>> text", 1.0, 0.0),
        ("validate_highlighted_sections", {"N": 2}, "****", 1.0, 0.0),
        ("validate_highlighted_sections", {"N": 2}, "*one* and **two words**", 1.0, 1.0),
        ("validate_highlighted_sections", {"N": 2}, "**one**", 1.0, 0.0),
        ("validate_sections", {"N": 2, "section_splitter": "Section"}, "Hi\nSection 1\na\nSection 2\nb", 0.0, 1.0),
        ("validate_json_format", {}, "5", 1.0, 0.0),
        ("validate_json_format", {}, '```json\n{"a": 1}\n```', 0.0, 1.0),
        ("validate_repeat_prompt", {"original_prompt": "Say hi"}, "Say hi", 1.0, 0.0),
        ("validate_repeat_prompt", {"original_prompt": "Say hi "}, "Say hi\nHi!", 0.0, 1.0),
        ("validate_two_responses", {}, "****** one", 1.0, 0.0),
        ("validate_two_responses", {}, "one ******* two", 1.0, 0.0),
        ("validate_two_responses", {}, "one\n******\ntwo", 1.0, 1.0),
        ("validate_uppercase", {}, "123", 1.0, 0.0),
        ("validate_lowercase", {}, "123", 1.0, 0.0),
        ("validate_end", {"end_phrase": "The end. "}, "It was. The end.", 0.0, 1.0),
        ("validate_quotation", {}, '"', 1.0, 0.0),
        ("validate_no_commas", {}, "", 1.0, 0.0),
        ("validate_word_constraint", {"N": 5, "quantifier": "at most"}, "", 1.0, 0.0),
        ("validate_word_constraint", {"N": 20, "quantifier": "around"}, "w " * 18, 1.0, 1.0),
        ("verify_paragraph_count", {"N": 2}, "a\n* * *\nb", 1.0, 1.0),
        ("verify_letter_frequency", {"letter": "e", "N": 2}, "Eel eel", 0.0, 0.0),
        ("verify_keywords", {"keyword_list": ["Fox", "dog"]}, "the fox and the dog", 1.0, 1.0),
    ],
)
def test_ifeval(name: str, arguments: dict[str, Any], completion: str, paper: float, fixed: float) -> None:
    # Rows hold every argument there is; null ones are unused.
    unused = {key: None for readers in ARGUMENTS.values() for key in readers} | arguments
    assert ifeval("paper", completion, name, **unused) == paper
    assert ifeval("fixed", completion, name, **unused) == fixed


def test_a_dictionary_is_not_changed_by_grading_it() -> None:
    """The original took func_name out of it: the second answer to one prompt was always wrong."""
    truth = json.dumps({"func_name": "validate_lowercase"})
    assert [verify("ifeval@paper", "small", truth) for _ in range(3)] == [1.0, 1.0, 1.0]
    assert verify("ifeval", "small", json.dumps(truth)) == 1.0  # JSON text of JSON text, as some exports hold it


@pytest.mark.parametrize(
    ("constraint", "fault"),
    [
        ({}, "no func_name"),
        ({"func_name": "validate_titel"}, r"unknown func_name 'validate_titel' \(did you mean 'validate_title'\?\)"),
        ({"func_name": "verify_bullet_points"}, "verify_bullet_points lacks its argument N"),
        ({"func_name": "validate_word_constraint", "N": None, "quantifier": None}, "lacks its argument N, quantifier"),
        ({"func_name": "validate_title", "N": 3}, "validate_title has no argument 'N'; it takes none"),
        ({"func_name": "verify_bullet_points", "N": "3"}, "a count is no whole number"),
        ({"func_name": "verify_bullet_points", "N": True}, "a count is no whole number"),
        ({"func_name": "verify_bullet_points", "N": 10**30}, "not between 0 and 1,000,000"),
        ({"func_name": "verify_letter_frequency", "letter": "ab", "N": 1}, "no single character"),
        ({"func_name": "verify_keywords", "keyword_list": []}, "empty"),
        ({"func_name": "verify_keywords", "keyword_list": "fox"}, "no list of texts"),
        ({"func_name": "verify_sentence_constraint", "N": 3, "quantifier": "exactly"}, "none of at least, around"),
        ({"func_name": "validate_paragraphs", "N": 2, "i": 3, "first_word": "a"}, "no paragraph i of N"),
        ({"func_name": "validate_response_language", "language": "klingon"}, "unknown language 'klingon'"),
        ({"func_name": ["validate_title"]}, "no func_name"),
    ],
)
def test_constraints_that_cannot_be_graded_say_why(constraint: dict[str, Any], fault: str) -> None:
    truth = json.dumps(constraint)
    assert verify("ifeval", "A text.", truth) is None
    with pytest.raises(AssertionError, match=fault):
        raise AssertionError(fault_of_truth("ifeval", truth))


def test_infinity_and_deep_nesting_are_no_counts() -> None:
    for number in ("Infinity", "-Infinity", "NaN", "1e400", "9" * 5_000, "[" * 5_000 + "]" * 5_000):
        assert verify("ifeval", "A text.", f'{{"func_name": "verify_bullet_points", "N": {number}}}') is None


@pytest.mark.parametrize("options", ['["yes", "no"]', "['yes', 'no']", "(yes, no)", "yes/no", "yes | no", "yes\nno"])
def test_options_may_be_a_text(options: str) -> None:
    assert ifeval("fixed", "I say yes", "validate_choice", options=options) == 1.0
    assert ifeval("fixed", "I say nothing", "validate_choice", options=options) == 0.0


def test_all_25_functions_are_there() -> None:
    assert len(ARGUMENTS) == 25
