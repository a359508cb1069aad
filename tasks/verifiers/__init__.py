"""Verifiers: does a completion answer a prompt correctly? Pure functions of text; no model, no network, no `eval`.

`verify(name, completion, ground_truth)` returns 1.0 or 0.0, or None where the *ground truth* cannot be read: a data
error must not punish or reward the policy. No completion makes it raise: an exception would end an RL run after hours.
Only programming errors raise: an unknown verifier name, or an argument that is not text.
"""

from __future__ import annotations

from collections.abc import Callable

from smoltulu.tasks.verifiers.constraints import verify_constraint
from smoltulu.tasks.verifiers.gsm8k import verify_gsm8k
from smoltulu.tasks.verifiers.math import verify_math

#: Name in a data set -> verifier. Case does not count: data sets write both `MATH` and `math`.
VERIFIERS: dict[str, Callable[[str, str], float | None]] = {
    "gsm8k": verify_gsm8k,
    "math": verify_math,
    "constraint": verify_constraint,
}


def verify(name: str, completion: str, ground_truth: str) -> float | None:
    """Score one completion.

    Args:
        name: a verifier, see `VERIFIERS`.
        completion: what the model wrote (the assistant's text only, without the template's headers).
        ground_truth: the answer in that verifier's own form.

    Returns:
        1.0 right, 0.0 wrong, None if the ground truth cannot be graded.

    Raises:
        ValueError: unknown verifier name.
    """
    wanted = str(name).lower()
    if wanted not in VERIFIERS:
        hint = (
            "IFEval's own constraint functions are not implemented yet: drop those rows from data.rlvr."
            if wanted == "ifeval"
            else "Map the dataset's name to one of these, or drop its rows."
        )
        raise ValueError(f"unknown verifier {name!r}; known verifiers: {', '.join(sorted(VERIFIERS))}. {hint}")
    return VERIFIERS[wanted](completion, ground_truth)
