"""Scores of paper_ifeval.yaml: lm-eval's checkers, without the network and without chance.

lm-eval's own way needs a download (punkt), draws arguments that a row does not give, and lets langdetect guess anew
each time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from smoltulu.tasks.evaluation.ifeval import prepare_punkt


def instruction_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """IFEval's strict accuracies. `average_strict` of an item is what its average is made of: a bool an instruction."""
    followings = followed(doc, results[0])
    return {
        "average_strict": followings,
        "prompt_level_strict_acc": float(all(followings)),
        "inst_level_strict_acc": followings,
        "num_followed_strict": float(sum(followings)),
        "num_instructions": float(len(followings)),
    }


def instruction_level(items: Sequence[Sequence[bool]]) -> float:
    """Share of all instructions that were followed."""
    return sum(map(sum, items)) / sum(map(len, items))


def average_strict(items: Sequence[Sequence[bool]]) -> float:
    """Mean of the share of prompts with all instructions followed and the share of instructions followed."""
    return (fmean(map(all, items)) + instruction_level(items)) / 2


def _average_strict_stderr(items: Sequence[Sequence[bool]]) -> float | None:
    """Standard error of `average_strict` over prompts; of the share of instructions, a ratio, to first order."""
    if len(items) < 2:
        return None
    share, mean_length = instruction_level(items), fmean(map(len, items))
    parts = [(all(one) + (sum(one) - share * len(one)) / mean_length) / 2 for one in items]
    return stdev(parts) / math.sqrt(len(parts))


average_strict.stderr = _average_strict_stderr  # type: ignore[attr-defined]


def followed(doc: Mapping[str, Any], response: str) -> list[bool]:
    """Of each instruction of an IFEval row, whether `response` follows it strictly. An empty one follows none.

    Raises:
        ValueError: an instruction that does not exist or lacks an argument, which lm-eval would draw at random.
    """
    import langdetect

    prepare_punkt()
    langdetect.DetectorFactory.seed = 0
    return [
        bool(response.strip()) and bool(_checker(doc, number).check_following(response))
        for number in range(len(doc["instruction_id_list"]))
    ]


def _checker(doc: Mapping[str, Any], number: int) -> Any:
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    name = doc["instruction_id_list"][number]
    if name not in INSTRUCTION_DICT:
        raise ValueError(
            f"IFEval row {doc['key']}: unknown instruction {name!r}; known: {', '.join(sorted(INSTRUCTION_DICT))}"
        )
    given = {argument: value for argument, value in doc["kwargs"][number].items() if value}
    checker = INSTRUCTION_DICT[name](name)
    checker.build_description(**given)
    used = checker.get_instruction_args() or {}
    if "prompt" in used:
        checker.build_description(prompt=doc["prompt"])
    if name == "keywords:letter_frequency" and "letter" in given:
        checker._letter = given["letter"].lower()  # of `#` and `!`, in two rows, lm-eval makes a random letter
    if missing := sorted(used.keys() - given.keys() - {"prompt", "prompt_to_repeat"}):
        raise ValueError(
            f"IFEval row {doc['key']}: {name} lacks {', '.join(missing)} (0 and empty count as missing), and lm-eval "
            "would draw it at random; give it in kwargs or take the instruction out"
        )
    return checker
