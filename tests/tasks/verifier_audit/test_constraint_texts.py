"""Texts of known worth: the verifiers must agree with them, and they with hand-made cases."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from smoltulu.tasks.verifier_audit.constraint_texts import texts_of
from smoltulu.tasks.verifier_audit.language_samples import SAMPLES
from smoltulu.tasks.verifier_audit.other_texts import form_texts, world_texts
from smoltulu.tasks.verifiers import Graders
from smoltulu.tasks.verifiers.exact import FORMS
from smoltulu.tasks.verifiers.ifeval import ARGUMENTS, LANGUAGES, read_constraint
from smoltulu.tasks.world import constraints as world

#: Values of every argument, odd ones among them.
VALUES: dict[str, list[Any]] = {
    "keyword_list": [["tree", "green"], ["the"], ["it's", "one", "answer"]],
    "word": ["and", "cat", "New York", "it's"],
    "N": [0, 1, 2, 7, 40],
    "forbidden_words": [["an", "answer"], ["yes", "so"], ["?", "cat"]],
    "letter": ["a", "A", "#", "0"],
    "language": ["en", "de", "hi", "zh-cn"],
    "quantifier": ["at least", "around", "at most"],
    "first_word": ["There", "zero", "0"],
    "i": [1, 2],
    "postscript_marker": ["P.S.", "P.P.S"],
    "options": [
        ["yes", "no", "maybe"],
        ["a", "b"],
        ["My answer is yes.", "My answer is no."],
        ["yes", "yes of course"],
    ],
    "section_splitter": ["SECTION", "*"],
    "original_prompt": ["Write a poem.", "An answer"],
    "end_phrase": ["Is there anything else?", "?", "answer."],
}


def constraints() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for function, arguments in ARGUMENTS.items():
        for values in itertools.product(*(VALUES[name] for name in arguments)):
            given = dict(zip(arguments, values, strict=True))
            if function != "validate_paragraphs" or given["i"] <= given["N"]:
                found.append((function, given))
    return found


@pytest.fixture(scope="module")
def graders() -> Any:
    with Graders() as graders:
        yield graders


def test_the_verifier_agrees_about_every_constraint(graders: Graders) -> None:
    wanted, asked = [], []
    for function, arguments in constraints():
        truth = json.dumps({"func_name": function, **arguments})
        texts = texts_of(*read_constraint(truth))
        expected = [(texts.keeps, "right", "keeps"), (texts.breaks, "wrong", "breaks")]
        expected += [
            (text, "wrong", name) for name, (text, must_be_wrong) in (texts.hacks or {}).items() if must_be_wrong
        ]
        for text, outcome, name in expected:
            if text is not None:
                asked.append(("ifeval", text, truth))
                wanted.append((outcome, name))
    found = [
        (job, name, verdict.reason)
        for job, (outcome, name), verdict in zip(asked, wanted, graders.grade_all(asked), strict=True)
        if verdict.outcome != outcome
    ]
    assert not found and len(asked) > 400


def test_a_text_is_made_for_every_function_and_most_arguments() -> None:
    made: dict[str, list[bool]] = {}
    for function, arguments in constraints():
        texts = texts_of(function, arguments)
        made.setdefault(function, []).append(texts.keeps is not None and texts.breaks is not None)
    assert made.keys() == ARGUMENTS.keys()
    assert {function for function, all_made in made.items() if not any(all_made)} == set()
    # Not made: no text of no words, no paragraphs of none, no fewer than none.
    partly = {function for function, all_made in made.items() if not all(all_made)}
    assert partly == {
        "validate_word_constraint", "verify_sentence_constraint", "validate_frequency_capital_words",
        "verify_paragraph_count", "validate_sections", "validate_placeholders", "validate_highlighted_sections",
    }  # fmt: skip
    assert texts_of("unheard_of", {}).keeps is None


def test_texts_by_hand() -> None:
    two = texts_of("verify_keyword_frequency", {"word": "cat", "N": 2})
    assert (two.keeps, two.breaks) == ("cat, cat", "cat, cat, cat")
    five = texts_of("validate_word_constraint", {"N": 5, "quantifier": "at least"})
    assert (five.keeps, five.breaks) == ("word word word word word", "word word word word")
    assert texts_of("validate_word_constraint", {"N": 10**6, "quantifier": "at least"}).keeps is None
    hacks = texts_of("validate_choice", {"options": ["yes", "no"]}).hacks
    assert hacks == {
        "all options at once": ("yes no", True), "one letter of an option": ("y", True), "a full stop": (".", True),
    }  # fmt: skip


def test_the_samples_are_in_their_languages(graders: Graders) -> None:
    """Of the 55 that langdetect tells apart, those that are most written."""
    assert SAMPLES.keys() <= set(LANGUAGES.values()) and len(SAMPLES) >= 39
    truths = [json.dumps({"func_name": "validate_response_language", "language": code}) for code in SAMPLES]
    asked = [("ifeval", text, truth) for text, truth in zip(SAMPLES.values(), truths, strict=True)]
    wrong = [job for job, verdict in zip(asked, graders.grade_all(asked), strict=True) if verdict.outcome != "right"]
    assert not wrong


WORLD = [
    {"kind": "upper_case", "mention": ["red", "fox"]},
    {"kind": "ends_with", "mention": ["red", "fox"], "text": "amen"},
    {"kind": "starts_with", "mention": ["red", "fox"], "text": "Well"},
    {"kind": "word_count", "mention": ["red", "fox"], "count": 4},
    {"kind": "word_count", "mention": ["red", "fox"], "count": 1},
    {"kind": "items", "count": 1, "among": ["fig", "plum"]},
    {"kind": "items", "count": 3, "among": ["fig", "plum", "pear"]},
    {"kind": "items", "count": 3, "among": ["fig", "plum"]},
    {"kind": "ends_with", "mention": ["red fox"], "text": "amen"},
    {"kind": "upper_case", "mention": ["Straße"]},
]


@pytest.mark.parametrize("truth", [*WORLD, *FORMS, "Answer: {}", "<a>{}</a>{}"], ids=str)
def test_the_verifier_agrees_about_the_world_and_forms(truth: Any, graders: Graders) -> None:
    verifier, written = ("constraint", json.dumps(truth)) if isinstance(truth, dict) else ("format", truth)
    if isinstance(truth, dict):
        arguments = {name: value for name, value in truth.items() if name not in ("kind", "mention")}
        texts = world_texts(truth["kind"], arguments, truth.get("mention", []))
    else:
        texts = form_texts(truth)
    assert (texts.keeps is None) == (truth in (WORLD[4], WORLD[7]))
    for text, outcome in [(texts.keeps, "right"), (texts.breaks, "wrong")]:
        assert text is None or graders.grade(verifier, text, written).outcome == outcome, text
    for name, (text, must_be_wrong) in (texts.hacks or {}).items():
        assert not must_be_wrong or graders.grade(verifier, text, written).outcome == "wrong", name


def test_every_kind_of_the_world_has_texts() -> None:
    assert {truth["kind"] for truth in WORLD} == set(world.KINDS)
