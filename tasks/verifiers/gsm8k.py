"""Word problems whose worked answer ends in `#### number` (GSM8K)."""

from __future__ import annotations

from smoltulu.tasks.verifiers.numbers import only_number


def verify_gsm8k(completion: str, ground_truth: str) -> float | None:
    """Numeric equality of the one number after the last `####`.

    The ground truth is a number or a worked answer with `#### number`. Text after `####` that holds no number, or more
    than one (a guess spread over several), is wrong.
    """
    expected = only_number(ground_truth.rpartition("####")[2])
    if expected is None:
        return None
    _, mark, tail = completion.rpartition("####")
    given = only_number(tail) if mark else None
    return float(given is not None and given == expected)
