"""What the task definitions beside this file cannot say in YAML; they take all functions from here."""

from __future__ import annotations

from typing import Any

from smoltulu.tasks.evaluation.local_files import read_splits
from smoltulu.tasks.verifiers import verify


def prompt_text(doc: dict[str, Any]) -> str:
    """The prompt as text; a list of messages must be a single user turn, as lm-eval applies the template itself."""
    prompt = doc.get("prompt") or doc.get("messages")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        user = [turn for turn in prompt if turn["role"] != "assistant"]
        if len(user) == 1:
            return user[0]["content"]
    raise ValueError(f"tiny_instructions needs a prompt that is text or one user message; got {prompt!r:.200}")


def verified(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the row's verifier accepts the completion. An ungradable row is a fault of the evaluation set."""
    score = verify(doc["verifier"], results[0], doc["ground_truth"])
    if score is None:
        raise ValueError(f"verifier {doc['verifier']!r} cannot read the ground truth {doc['ground_truth']!r:.200}")
    return {"acc": score}


def piqa(**kwargs: Any) -> Any:
    """Join the labels (one a line) to the rows of `validation`."""
    splits = read_splits(**kwargs)
    labels = [int(row["text"]) for row in splits.pop("labels")]
    if len(labels) != len(splits["validation"]):
        raise ValueError(f"local_piqa: {len(splits['validation'])} rows, {len(labels)} labels; they must match by line")
    splits["validation"] = splits["validation"].add_column("label", labels)
    return splits
