"""What an answer says, read by the audit's own code."""

from __future__ import annotations

import pytest

from smoltulu.tasks.verifier_audit.answers import alternatives, committed_keys, gold_answers, gold_keys, last_boxed


@pytest.mark.parametrize(
    ("family", "truth", "keys"),
    [
        ("gsm8k", "He has 3 + 4 = 7.\n#### 7", {"7"}), ("gsm8k", "1,000", {"1000"}), ("gsm8k", "-5", {"-5"}),
        ("gsm8k", "$1.50", {"3/2"}), ("gsm8k", '["7", "7.0", "eight"]', {"7"}), ("gsm8k", "none", set()),
        ("gsm8k_strict", "#### -0", {"0"}),
        ("math", r"\frac12", {"1/2"}), ("math", r"so $x = \boxed{\dfrac{1}{2}}$.", {"1/2"}), ("math", "0.5", {"1/2"}),
        ("math", ".5", {"1/2"}), ("math", "1/2", {"1/2"}), ("math", "x=1,000", {"1000"}), ("math", "1,2", {"1,2"}),
        ("math", r"\left( 3, 4 \right)", {"(3,4)"}), ("math", r"50\%", {"50"}), ("math", r"\text{East}", {"East"}),
        ("math", r"1/0", {"1/0"}), ("exact_match", " a b \n", {"a b"}),
    ],
)  # fmt: skip
def test_keys_of_truths(family: str, truth: str, keys: set[str]) -> None:
    assert gold_keys(family, truth) == keys


def test_alternatives_are_a_list_of_texts_only() -> None:
    assert alternatives('["a", " b "]') == ["a", "b"]
    for whole in ("[1, 2]", "[]", "[broken", "(1, 2)"):
        assert alternatives(whole) == [whole]
    assert alternatives("[" * 100_000) == ["[" * 100_000]
    assert gold_answers("math", r'["\\boxed{1}", "2"]') == ["1", "2"]


@pytest.mark.parametrize(
    ("family", "text", "keys"),
    [
        ("gsm8k", "first 3, then 4.", {"4", "-4"}), ("gsm8k", "none", set()),
        ("gsm8k", "#### 3 or 4", {"3", "-3", "4", "-4"}),
        ("gsm8k", "#### 3\nIn 4 days.", {"3", "-3", "4", "-4"}),
        ("gsm8k_strict", "4", set()), ("gsm8k_strict", "#### 1 2 3", {"1", "-1", "3", "-3"}),
        ("gsm8k_strict", "#### 1\n#### 2", {"2", "-2"}),
    ],
)  # fmt: skip
def test_answers_that_a_text_gives(family: str, text: str, keys: set[str]) -> None:
    assert committed_keys(family, text) == keys


def test_answers_that_a_mathematical_text_gives() -> None:
    assert "4" in committed_keys("math", r"$\boxed{3}$, no, $\boxed{4}$")
    assert "3" not in committed_keys("math", r"\boxed{3} \boxed{4}")
    assert "1/2" in committed_keys("math", "Final Answer: The final answer is $0.5$. I hope it is correct.")
    assert committed_keys("math", "") == set()


def test_the_last_box() -> None:
    assert last_boxed(r"\boxed{a{b}c} \boxed{d}") == "d"
    assert last_boxed(r"\boxed{a{b}c}") == "a{b}c"
    assert last_boxed(r"\boxed{a") is None and last_boxed("a") is None and last_boxed("") is None
