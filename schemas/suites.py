"""Suites: names for lists of evaluation tasks, each task with its headline metric. Pure data.

The entry `{suite: paper}` of `evaluation.tasks` stands for the tasks below, `{suite: paper, limit: 20}` for their first
items. What is stored and hashed are the tasks, so a list written out gives the same key.
"""

from __future__ import annotations

import difflib
from typing import Any

from smoltulu.schemas.common import StrictModel, science

SUITES: dict[str, tuple[dict[str, Any], ...]] = {
    # The rows of SmolLM2's model card and of SmolTulu's paper, as lighteval made them (docs/evaluation.md).
    "paper": (
        {"name": "paper_arc", "metric": "acc_norm,none"},
        {"name": "paper_bbh", "metric": "exact_match,none"},
        {"name": "paper_gsm8k", "metric": "exact_match,none"},
        {"name": "paper_hellaswag", "metric": "acc_norm,none"},
        {"name": "paper_ifeval", "metric": "average_strict,none"},
        {"name": "paper_mmlu_pro", "metric": "acc,none"},
        {"name": "paper_piqa", "metric": "acc_norm,none"},
    ),
    # lm-eval's own tasks with their own numbers of examples: comparable with everyone who runs lm-eval.
    "harness": (
        {"name": "arc_challenge", "metric": "acc_norm,none"},
        {"name": "arc_easy", "metric": "acc_norm,none"},
        {"name": "bbh_fewshot", "metric": "exact_match,none"},
        {"name": "gsm8k", "metric": "exact_match,strict-match"},
        {"name": "hellaswag", "metric": "acc_norm,none"},
        {"name": "ifeval", "metric": "prompt_level_strict_acc,none"},
        {"name": "leaderboard_mmlu_pro", "metric": "acc,none"},
        {"name": "piqa", "metric": "acc_norm,none"},
    ),
    # The nearest tasks of lm-eval to Tulu 3's development suite (arXiv:2411.15124, table 24). Not in it, as lm-eval has
    # no task for them: PopQA, and AlpacaEval 2, which also needs a judge. Nor HumanEval and HumanEval+: they run
    # the model's code without a sandbox, and load their metric from the Hub.
    "tulu3": (
        {"name": "bbh_cot_fewshot", "metric": "exact_match,get-answer"},
        {"name": "drop", "metric": "f1,none", "num_fewshot": 3},
        {"name": "gsm8k_cot", "metric": "exact_match,flexible-extract"},
        {"name": "hendrycks_math", "metric": "exact_match,none", "num_fewshot": 4},
        {"name": "ifeval", "metric": "prompt_level_loose_acc,none"},
        {"name": "mmlu", "metric": "acc,none", "num_fewshot": 0},
        {"name": "truthfulqa_mc2", "metric": "acc,none"},
    ),
    # The two tasks of the generated world: no model or data of others is needed.
    "tiny": (
        {
            "name": "tiny_arithmetic",
            "metric": "exact_match,strict-match",
            "files": {"test": {"generated": "eval_arithmetic.jsonl", "format": "text"}},
        },
        {
            "name": "tiny_instructions",
            "metric": "acc,none",
            "files": {"test": {"generated": "eval_instructions.jsonl", "format": "text"}},
        },
    ),
}


class Suite(StrictModel):
    """An entry of `evaluation.tasks` that stands for several, as a form or an editor sees it."""

    suite: str = science(description=f"one of {', '.join(SUITES)}")
    limit: int | None = science(None, ge=1, description="of each task, first documents only")


def expand(entries: Any) -> Any:
    """The entries of `evaluation.tasks` as given, with every suite replaced by its tasks.

    ValueError: unknown suite, or a field that it has not.
    """
    if not isinstance(entries, (list, tuple)):
        return entries  # pydantic says what is wrong
    tasks: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict) and "suite" in entry:
            others = {name: value for name, value in entry.items() if name != "suite"}
            if unknown := sorted(others.keys() - Suite.model_fields.keys()):
                raise ValueError(
                    f"a suite has the field limit only; got {', '.join(unknown)}. For more, write its tasks out "
                    "(docs/evaluation.md)"
                )
            tasks += [{**task, **others} for task in _suite(entry["suite"])]
        else:
            tasks.append(entry)
    return tasks


def _suite(name: Any) -> tuple[dict[str, Any], ...]:
    if name not in tuple(SUITES):
        near = difflib.get_close_matches(str(name), SUITES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown suite {name!r}; there are: {', '.join(sorted(SUITES))}{hint}")
    return SUITES[name]
