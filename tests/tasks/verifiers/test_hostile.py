"""No text makes a verifier raise, hang or grow: what models and attackers write, and what hypothesis finds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoltulu.tasks.verifiers import VERSIONS, Graders, canonical_name, fault_of_truth
from smoltulu.tasks.verifiers.ifeval import ARGUMENTS
from smoltulu.tasks.verifiers.rules import QUICK, grade_quickly
from smoltulu.tasks.verifiers.worker import WALL_SECONDS

MEGA = 1_000_000
_UNITS = [
    "9", "1,", "1,111", "{", "}", "$", "$ ", "\\(", "\\[\\]", "####", "#### 1", "*", "* ", "*a", "[", "[]", "<", "<<>",
    "\n", "\n \n", " ", "a", "A", "a ", "aA", ".", "! ", '"', "- ", "-\n", "\0", "\ud800", "\\frac", "\\boxed{", "P.S.",
    "\\boxed 1$", "******", "Final Answer: The final answer is ", "<think>", "Section", "é", "٣", "-", "1.", '{"a":',
]  # fmt: skip
#: What goes into a box. The first ones hang or grow where they are evaluated.
SHORT = [
    "9^{9^{9^9}}", "9999999!", "\\prod_{n=1}^{10^9} n", "x^{10^9}-1",
    "\\frac{1}{" * 60 + "1" + "}" * 60, "\\frac" * 150, "\\sqrt{" * 100 + "2" + "}" * 100, "(" * 200 + ")" * 200,
    "1," * 400, "\\{" * 200 + "\\}" * 200, "9" * 990, "x^{" * 100 + "}" * 100, "\\int_0^1 x^x dx", "(a+b+c+d)^{200}",
    "\\pm" * 100, "1\\pm" * 50 + "1", "=" * 500, "x<" * 300, "\\cup" * 200, "\\begin{pmatrix}" * 60, "&" * 500, "\0",
    "\ud800", "\\text{" * 150, "_" * 500, "^" * 500, "%" * 500, "|" * 500, "1/" * 400 + "1", "e^{e^{e^{e^{10}}}}",
    "1/0", "\\frac{0}{0}", "0^0", "\\{\\}", "()", ",", ";", "\\", "-", "\\infty-\\infty",
]  # fmt: skip

_ARGUMENTS: dict[str, Any] = {
    "N": 2, "i": 1, "quantifier": "at least", "keyword_list": ["a"], "forbidden_words": ["b", "aa"], "letter": "a",
    "options": ["a", "b"], "word": "aa", "language": "en", "first_word": "a", "postscript_marker": "P.S.",
    "original_prompt": "aa", "section_splitter": "Section", "end_phrase": "a",
}  # fmt: skip
IFEVAL = [
    json.dumps({"func_name": name, **{key: _ARGUMENTS[key] for key in readers}}) for name, readers in ARGUMENTS.items()
]
TRUTHS: dict[str, list[str]] = {
    "gsm8k": ["18"],
    "gsm8k_strict": ["18"],
    "math": ["18", "\\frac{x}{2}", "(1,2)", "1, 2, x", "x<2"],
    "ifeval": IFEVAL,
    "constraint": ['{"kind": "items", "count": 2, "among": ["a", "b"]}', '{"kind": "upper_case", "mention": ["a"]}'],
    "exact_match": ["a"],
    "format": ["number", "hash", "boxed", "think_answer", "json", "So {} is {}."],
}
NAMES = sorted(QUICK)


@pytest.fixture(scope="module")
def graders() -> Iterator[Graders]:
    with Graders(1) as graders:
        graders.grade("math", r"\boxed{1+x}", "x+1")
        yield graders


def test_every_verifier_is_tried() -> None:
    assert TRUTHS.keys() == VERSIONS.keys()
    assert {canonical_name(f"{name}@{version}") for name in VERSIONS for version in VERSIONS[name]} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_megabyte_is_graded_in_linear_time_in_this_process(name: str) -> None:
    """A megabyte for one ground truth, a tenth of it for the others: what is quadratic takes minutes there as well."""
    for number, truth in enumerate(TRUTHS[name.partition("@")[0]]):
        assert fault_of_truth(name, truth) is None
        for unit in _UNITS:
            text = unit * ((MEGA if number == 0 else MEGA // 10) // len(unit))
            begun = time.process_time()
            verdict = grade_quickly(name, text, truth)
            assert time.process_time() - begun < 2  # 0.2 s at most where this was written
            assert verdict is None or verdict.outcome != "could_not_grade", (unit, verdict)
    too_long = grade_quickly(name, "a" * (MEGA + 1), truth)
    assert too_long is not None and too_long.outcome == "wrong"


def test_no_box_crashes_a_grader(graders: Graders) -> None:
    for answer in SHORT:
        begun = time.monotonic()
        verdict = graders.grade("math", f"\\boxed{{{answer}}}", "(1, x)" if "(" in answer else "\\frac{x}{2}")
        assert verdict.outcome == "wrong", (answer[:30], verdict)
        assert time.monotonic() - begun < 10 * WALL_SECONDS


def test_hostile_texts_for_the_other_slow_verifiers(graders: Graders) -> None:
    language = json.dumps({"func_name": "validate_response_language", "language": "de"})
    for text in ("\\frac" * 100, "\\boxed{" * 10_000, "a" * MEGA, "\0", "\ud800", "", "1," * 1_000):
        assert graders.grade("math@paper", text, "18").outcome == "wrong"
        assert graders.grade("ifeval", text, language).outcome == "wrong"


_pieces = st.sampled_from([
    "1", "2", "-", "+", "x", ",", ".", "/", "^", "_", "{", "}", "(", ")", "[", "]", "\\frac", "\\sqrt", "\\text{",
    "\\{", "\\}", "\\boxed{", "$", "\\(", "\\)", "=", "<", "\\le", "\\cup", "\\pm", "\\in", "%", "^\\circ", "####",
    "*", "\\\\", "&", "\\begin{pmatrix}", "\\end{pmatrix}", "!", "\\infty", "\\overline{", "0.", "[a]", "<<", ">>",
    '"', "\0", "\ud800", "é", "{}", " ", "\n",
])  # fmt: skip
_texts = st.one_of(st.text(max_size=40), st.lists(_pieces, max_size=25).map("".join))
_truths = st.one_of(_texts, st.sampled_from([truth for truths in TRUTHS.values() for truth in truths]))


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(NAMES), _texts, _truths)
def test_no_text_and_no_truth_makes_a_rule_fail(name: str, completion: str, truth: str) -> None:
    fault = fault_of_truth(name, truth)
    verdict = grade_quickly(name, completion, truth)
    assert fault is None or "failed" not in fault
    assert verdict is None or verdict.outcome != "could_not_grade" or verdict.reason == fault


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=_texts, truth=st.sampled_from(["\\frac{x}{2}", "x+1", "(1, \\sqrt2)", "y = 2x", "\\pi"]))
def test_no_box_is_equal_or_crashes(graders: Graders, answer: str, truth: str) -> None:
    assert graders.grade("math", f"\\boxed{{{answer}}}", truth).outcome in ("right", "wrong")
