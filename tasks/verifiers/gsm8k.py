"""Word problems with a number for an answer (GSM8K): Tulu's rule, the last number; and the strict one, `#### number`.

`grade_paper` is `verify_gsm8k_sample` of open-instruct at 26b7325 (open_instruct/ground_truth_utils.py), bugs included.
"""

from __future__ import annotations

import re

from smoltulu.tasks.verifiers.numbers import last_number, numbers_in, only_number, plain_digits
from smoltulu.tasks.verifiers.truths import BadTruth, alternatives
from smoltulu.tasks.verifiers.verdict import Verdict, quoted, right, wrong

_MARK = "####"
_DIRECTLY = re.compile(r"[-+]?[$€£¥]?[-+]?(?:[0-9]|\.[0-9])")
# What makes another value of the number before it: 1/2, 2^3, 1,5, 18-20, 5e3, 5½, 5k, 5 million, 5 1/2, 1 000, 5 * 2,
# 3 or 4.
_GOES_ON = re.compile(
    r"[ \t]*[-+/^*:,×÷=–][ \t]*\.?[0-9]|[eE][-+]?[0-9]|[ \t]*[½⅓⅔¼¾⅛²³]|_|[ \t]+[0-9]|[kKmMbB](?![a-zA-Z])"
    r"|[ \t]*(?:,[ \t]*)?(?:or|and)[ \t]+[-+$€£¥]?\.?[0-9]"
    r"|[ \t]*(?:hundred|thousand|million|billion|trillion|dozen)(?![a-z])",
)
_PAPER_HEADER = "<|assistant|>\n"


def expected_numbers(ground_truth: str) -> list[str]:
    """The right numbers, in their one spelling: of a number, a worked answer with `#### number`, or a list of these.

    Raises:
        BadTruth: no number, or several that the answer could be.
    """
    numbers = [only_number(text.rpartition(_MARK)[2]) for text in alternatives(ground_truth)]
    if None in numbers:
        raise BadTruth("the ground truth holds no number, or several")
    return [number for number in numbers if number is not None]


def grade_last_number(completion: str, ground_truth: str) -> Verdict:
    """The last number of the text, by value; one that is marked with `####` is the one meant, whatever follows it."""
    expected = expected_numbers(ground_truth)
    if (marked := _marked_number(completion)) is not None:
        return _compare(marked, expected, "number after ####")
    if _DIRECTLY.match(_marked_text(completion)):
        return wrong("what follows #### is more than a number")
    return _compare(last_number(completion), expected, "last number")


def grade_strict(completion: str, ground_truth: str) -> Verdict:
    """The number directly after the last `####`, as lm-eval's strict-match; text after it does not spoil it."""
    expected = expected_numbers(ground_truth)
    marked = _marked_number(completion)
    if marked is None:
        return wrong("no number follows the last ####")
    return _compare(marked, expected, "number after ####")


def _marked_number(completion: str) -> str | None:
    """The number directly after the last `####`; None where there is none, or only the beginning of a larger thing."""
    tail = _marked_text(completion)
    if not _DIRECTLY.match(tail):
        return None
    number, end = next(numbers_in(tail))
    return None if _GOES_ON.match(tail, end) else number


def _marked_text(completion: str) -> str:
    """What stands after the last `####`; empty where there is none."""
    _, mark, tail = completion.rpartition(_MARK)
    return re.sub(r"\A([-+])[ \t]+", r"\1", plain_digits(tail.lstrip())) if mark else ""


def grade_paper(completion: str, ground_truth: str) -> Verdict:
    """Tulu's rule with its bugs: texts are compared, `1,000` loses its comma in the answer only, `-5` its sign."""
    # The original's rows hold what stands after ####.
    expected = [text.rpartition(_MARK)[2].strip() for text in alternatives(ground_truth)]
    if not all(expected):
        raise BadTruth("nothing stands after the #### of the ground truth")
    text = re.sub(r"(\d),(\d)", r"\1\2", completion.rpartition(_PAPER_HEADER)[2].strip())
    numbers = re.findall(r"[-+]?\d*\.\d+|\d+", text)
    given = str(numbers[-1] if numbers else text).lower()
    return _compare(given, [text.lower() for text in expected], "last number, as text,")


def _compare(given: str | None, expected: list[str], what: str) -> Verdict:
    if given is None:
        return wrong("there is no number")
    wanted = " or ".join(map(quoted, expected[:3]))
    if given in expected:
        return right(f"{what} {quoted(given)} equals {wanted}")
    return wrong(f"{what} {quoted(given)} is not {wanted}")
