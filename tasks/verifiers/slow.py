"""What runs in worker processes only: it can hang, grow, or backtrack on a model's text. `worker.py` sets the limits.

Each grader takes (text, ground truth, truth_is_read) and calls `truth_is_read` once the ground truth is done with: from
then on it is the answer's fault if the process ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from smoltulu.tasks.verifiers import ifeval, math_paper, math_symbolic
from smoltulu.tasks.verifiers.truths import BadTruth
from smoltulu.tasks.verifiers.verdict import Verdict, could_not_grade, right, wrong

Slow = Callable[[str, str, Callable[[], None]], Verdict]

#: langdetect itself looks at no more.
_MAX_LANGUAGE_CHARACTERS = 10_000


def prepare() -> None:
    """Import, and use once, what takes seconds, before children are forked."""
    logging.disable(logging.CRITICAL)
    math_symbolic.prepare()
    _detect("This is a sentence in English.")


def _math(answer: str, ground_truth: str, truth_is_read: Callable[[], None]) -> Verdict:
    return math_symbolic.grade_symbolically(answer, ground_truth, truth_is_read)


def _math_paper(completion: str, ground_truth: str, truth_is_read: Callable[[], None]) -> Verdict:
    truth_is_read()
    return math_paper.grade_paper(completion, ground_truth)


def _language(strict: bool) -> Slow:
    def grade(completion: str, ground_truth: str, truth_is_read: Callable[[], None]) -> Verdict:
        truth_is_read()
        _, arguments = ifeval.read_constraint(ground_truth, strict)
        detected = _detect(completion.strip())
        if detected is None:
            return wrong("no language can be told")
        # One script of Chinese is as good as the other where the code is just zh.
        same = detected == arguments["language"] or (strict and detected[:2] == arguments["language"] == "zh")
        return right(f"the language is {detected}") if same else wrong(f"{detected} is not {arguments['language']}")

    return grade


def _detect(text: str) -> str | None:
    """langdetect draws at random unless it has a seed: one text got two verdicts."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text[:_MAX_LANGUAGE_CHARACTERS]))
    except langdetect.LangDetectException:
        return None


def _safely(grader: Slow) -> Slow:
    def grade(text: str, ground_truth: str, truth_is_read: Callable[[], None]) -> Verdict:
        was_read = False

        def read() -> None:
            nonlocal was_read
            was_read = True
            truth_is_read()

        try:
            return grader(text, ground_truth, read)
        except BadTruth as error:
            return could_not_grade(str(error))
        except MemoryError:
            raise
        except Exception as error:  # libraries raise anything; the text that makes them is no answer
            what = f"cannot be read: {type(error).__name__}"
            return wrong(f"the answer {what}") if was_read else could_not_grade(f"the ground truth {what}")

    return grade


#: Verifier -> its grader.
SLOW: dict[str, Slow] = {
    "math": _safely(_math),
    "math@paper": _safely(_math_paper),
    "ifeval": _safely(_language(strict=True)),
    "ifeval@paper": _safely(_language(strict=False)),
}
