r"""Competition mathematics (MATH): text first, in this process; symbolically, in a worker, only where that cannot tell.

Exact: two answers are equal if and only if they have the same value. Numbers are compared as rationals, never rounded.
"""

from __future__ import annotations

import re
from functools import lru_cache

from smoltulu.tasks.verifiers.answers import final_answer, is_marked, last_boxed
from smoltulu.tasks.verifiers.math_compare import compare
from smoltulu.tasks.verifiers.math_text import canonical_expression, plain
from smoltulu.tasks.verifiers.math_values import Group, Leaf, Named, Node, as_list, read
from smoltulu.tasks.verifiers.truths import BadTruth, alternatives
from smoltulu.tasks.verifiers.verdict import Verdict, quoted, right, wrong

__all__ = ["MAX_ANSWER_CHARACTERS", "expected_answers", "final_answer", "grade_paper_text", "grade_text"]

#: What has a value that is not written there.
_TO_WORK_OUT = re.compile(r"\\(?:frac|div|times|cdot|binom|sqrt)(?![a-zA-Z])|[/*^!+]|[0-9a-z)}] *-")
#: Longer answers are equal to a ground truth only as text.
MAX_ANSWER_CHARACTERS = 1_000


def grade_text(completion: str, ground_truth: str) -> Verdict | None:
    """Right or wrong where the text says so; None where two expressions are spelled differently."""
    expected = expected_answers(ground_truth)
    answer = final_answer(completion)
    if answer is None:
        return wrong("no final answer is stated")
    wanted = " or ".join(quoted(text) for text, _ in expected[:3])
    if any(answer == text for text, _ in expected):
        return right(f"{quoted(answer)} is {wanted}")
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return wrong(f"the answer is longer than {MAX_ANSWER_CHARACTERS:,} characters")
    try:
        given = read(answer)
    except BadTruth as error:
        return wrong(f"the answer cannot be read: {error}")
    equal = [_compare(answer, given, text, node) for text, node in expected]
    if not is_marked(completion, answer) and (None in equal or _TO_WORK_OUT.search(plain(answer))):
        # A text that repeats its question ends in the formula that was to be worked out, whose value is the answer's.
        if _spelling(answer) not in [_spelling(text) for text, _ in expected]:
            return wrong(f"{quoted(answer)} is no marked answer, and is not spelled as {wanted}")
        return right(f"{quoted(answer)} is {wanted}")
    if True in equal:
        return right(f"{quoted(answer)} equals {wanted}")
    return None if None in equal else wrong(f"{quoted(answer)} is not {wanted}")


def grade_paper_text(completion: str, ground_truth: str) -> Verdict | None:
    """Tulu's textual rule backtracks: a worker applies it. Here only the ground truth is looked at."""
    alternatives(ground_truth)
    return None


@lru_cache(maxsize=20_000)
def expected_answers(ground_truth: str) -> tuple[tuple[str, Node], ...]:
    r"""The right answers, as text and as structure; of a worked solution what stands in its last `\boxed{}`.

    Raises:
        BadTruth: an answer that cannot be read.
    """
    found = []
    for text in alternatives(ground_truth):
        if "\\boxed" in text or "\\fbox" in text:
            text = (last_boxed(text) or "").strip()
        if len(text) > MAX_ANSWER_CHARACTERS:
            raise BadTruth(f"the answer is longer than {MAX_ANSWER_CHARACTERS:,} characters")
        found.append((text, read(text)))
    return tuple(found)


def _compare(answer: str, given: Node, truth: str, expected: Node) -> bool | None:
    """Whether two answers are equal as they are read, or where one is a list and the other may be one: `100,200`."""
    equal = compare(given, expected, _undecided)
    if equal is not False:
        return equal
    if _is_list(expected) and (listed := as_list(answer)) is not None:
        return compare(listed, expected, _undecided)
    if _is_list(given) and (listed := as_list(truth)) is not None:
        return compare(given, listed, _undecided)
    return False


def _is_list(node: Node) -> bool:
    node = node.node if isinstance(node, Named) else node
    return isinstance(node, Group) and node.kind in ("list", "set")


def _spelling(answer: str) -> str:
    return canonical_expression(plain(answer).rpartition("=")[2].strip())


def _undecided(given: Leaf, expected: Leaf) -> bool | None:
    return None
