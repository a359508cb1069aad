"""What a task needs to know of the model before its prompts are made.

Definitions ask for it in their `metadata`, as lm-eval has no words for it:

    drop_examples           examples are dropped from the end of a prompt until it fits together with its answer
    answer_margin           tokens that an answer may have beyond those of the task's longest target
    until_without_template  stop strings of plain prompts; under a chat template an answer ends with its turn
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

logger = logging.getLogger("smoltulu")


def check_model(model: HFLM, *, chat: bool) -> None:
    """ValueError: no chat template where one is applied, or no end-of-text token, without which no answer ends."""
    if chat and not model.tokenizer.chat_template:
        raise ValueError(
            "this model's tokenizer has no chat template, and evaluation.apply_chat_template is true; name one in "
            "chat_template (e.g. tulu), or set evaluation.apply_chat_template: false"
        )
    if model.tokenizer.eos_token_id is None:
        raise ValueError(
            "this model's tokenizer has no eos token, so no answer would end before its limit; set eos_token in the "
            "model's tokenizer_config.json"
        )


def check_description(leaf: Any, *, shipped: bool) -> dict[str, Any]:
    """Of a task that is run under a chat template: what its score must say of a `description`.

    ValueError: a definition of ours has one. lm-eval makes it a system message, in place of the template's own.
    """
    if not leaf.get_config("description"):
        return {}
    if shipped:
        raise ValueError(
            f"evaluation task {leaf.task_name!r} has a description, and lm-eval makes that a system message under a "
            "chat template; write it into doc_to_text, in the user's turn, or set evaluation.apply_chat_template: false"
        )
    logger.warning("%s: lm-eval gives the task's description as a system message", leaf.task_name)
    return {"description": "system message"}


def limit_answers(leaf: Any, num_tokens_of: Callable[[str], int], *, chat: bool) -> None:
    """Set the limit and the stop strings of a task's answers, as its metadata says."""
    metadata = leaf.get_config("metadata") or {}
    settings = dict(leaf.get_config("generation_kwargs") or {})  # the members of a group share theirs
    if "answer_margin" in metadata:
        longest = max(num_tokens_of(str(leaf.doc_to_target(doc))) for doc in leaf.eval_docs)
        settings["max_gen_toks"] = min(settings["max_gen_toks"], longest + metadata["answer_margin"])
    if not chat and "until_without_template" in metadata:
        settings["until"] = metadata["until_without_template"]
    if settings != leaf.get_config("generation_kwargs"):
        leaf.set_config(key="generation_kwargs", value=settings)


class FittedExamples:
    """Stands in for a task's `fewshot_context`: as many of its examples as fit, the first ones.

    num_with_fewer: prompts that have fewer examples than were asked for
    """

    def __init__(self, leaf: Any, num_tokens_of: Callable[[str], int], room: int) -> None:
        self.context, self.num_tokens_of, self.room = leaf.fewshot_context, num_tokens_of, room
        self.num_with_fewer = 0

    def __call__(self, doc: Any, num_fewshot: int, **given: Any) -> Any:
        for num in range(num_fewshot, -1, -1):
            text = self.context(doc, num_fewshot=num, **given)
            if self.num_tokens_of(text) <= self.room:
                break
        self.num_with_fewer += num < num_fewshot
        return text


def fit_examples(leaf: Any, model: HFLM, max_gen_toks: int, limit: int | None, *, chat: bool) -> FittedExamples | None:
    """Let a task drop the examples that do not fit, where its metadata says so. ValueError: not one ever fits."""
    num = leaf.get_config("num_fewshot")
    if not num or not (leaf.get_config("metadata") or {}).get("drop_examples"):
        return None
    room = model.max_length - max_gen_toks
    fitted = FittedExamples(leaf, lambda text: len(model.tok_encode(text)), room)
    given = {
        "apply_chat_template": chat,
        "fewshot_as_multiturn": chat,
        "chat_template": model.apply_chat_template if chat else None,
    }
    lengths = (fitted.num_tokens_of(leaf.fewshot_context(doc, num_fewshot=1, **given)) for doc in _first(leaf, limit))
    if (shortest := _first_fitting(lengths, room)) is not None:
        raise ValueError(
            f"evaluation task {leaf.task_name!r}: a prompt with one of its {num} examples has at least {shortest} "
            f"tokens, and evaluation.max_length {model.max_length} leaves {room} beside an answer of {max_gen_toks}: "
            "no example would ever fit. Raise max_length (if the model's positions allow) or set num_fewshot: 0"
        )
    leaf.fewshot_context = fitted
    return fitted


def _first(leaf: Any, limit: int | None) -> Any:
    return islice(leaf.eval_docs, limit)


def _first_fitting(lengths: Any, room: int) -> int | None:
    """None as soon as one length fits, else the shortest."""
    shortest: int | None = None
    for length in lengths:
        if length <= room:
            return None
        shortest = length if shortest is None else min(shortest, length)
    return shortest
