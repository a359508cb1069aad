"""Every verifier by name: what is decided at once, in this process, and what is wrong with a ground truth."""

from __future__ import annotations

from collections.abc import Callable

from smoltulu.tasks.verifiers import constraints, exact, gsm8k, ifeval, math
from smoltulu.tasks.verifiers.truths import BadTruth
from smoltulu.tasks.verifiers.verdict import Verdict, could_not_grade, wrong

#: Longer answers are wrong: no model of ours writes one, and what reads it must stay bounded.
MAX_COMPLETION_CHARACTERS = 1_000_000

#: Verifier -> a rule that takes linear time; None means that a worker decides (`slow.py`).
QUICK: dict[str, Callable[[str, str], Verdict | None]] = {
    "gsm8k": gsm8k.grade_last_number,
    "gsm8k@paper": gsm8k.grade_paper,
    "gsm8k_strict": gsm8k.grade_strict,
    "math": math.grade_text,
    "math@paper": math.grade_paper_text,
    "ifeval": ifeval.grade_fixed,
    "ifeval@paper": ifeval.grade_paper,
    "constraint": constraints.grade_constraint,
    "exact_match": exact.grade_exact_match,
    "format": exact.grade_format,
}


def grade_quickly(verifier: str, completion: str, ground_truth: str) -> Verdict | None:
    """The verdict of one answer where no worker is needed. `verifier` is a canonical name. Nothing is raised."""
    try:
        if len(completion) > MAX_COMPLETION_CHARACTERS:
            QUICK[verifier]("", ground_truth)  # a bad truth is not the answer's fault
            return wrong(f"the answer is longer than {MAX_COMPLETION_CHARACTERS:,} characters")
        return QUICK[verifier](completion, ground_truth)
    except BadTruth as error:
        return could_not_grade(str(error))
    except Exception as error:  # a fault of ours, which must not end a training; it is counted
        return could_not_grade(f"the verifier failed: {type(error).__name__}: {str(error)[:200]}")


def fault_of_truth(verifier: str, ground_truth: str) -> str | None:
    """Why a ground truth cannot be graded; None where it can. `verifier` is a canonical name."""
    verdict = grade_quickly(verifier, "", ground_truth)
    return verdict.reason if verdict is not None and verdict.outcome == "could_not_grade" else None


def text_for_worker(verifier: str, completion: str) -> str:
    """What a worker has to see of a completion."""
    return math.final_answer(completion) or "" if verifier == "math" else completion
