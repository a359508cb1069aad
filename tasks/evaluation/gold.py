"""Bits per byte of the right answer: it moves where accuracy is at its floor. Lower is better.

Of a multiple choice it comes from the right choice's log-likelihood. A task that generates answers is asked once more:
how likely is its right answer after the prompt? Bytes are those of the answer without white space before it, which
belongs to the prompt in some tasks and templates and to the answer in others. What a chat template writes before an
answer is no part of it either: lm-eval scores the newline behind `<|assistant|>`, which SFT never trains, and whose
log-likelihood may be many times that of a short answer. It is asked for, and taken off.

Reference: Gu et al., "OLMES: A Standard for Language Model Evaluations", 2024, arXiv:2406.08446.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

METRIC = "bits_per_byte"
#: Tasks whose `doc_to_target` is text, but no answer: rules of a verifier.
_NO_ANSWERS = ("tiny_instructions",)
#: Where a task that runs code keeps a right answer; its `doc_to_target` is the test.
_CODE_ANSWER = "canonical_solution"

_Item = tuple[str, int]  # name of the task, number of the document


class _Scored(NamedTuple):
    """A right answer and its log-likelihood in nats behind its prompt."""

    nats: float
    prompt: str
    answer: str


def bits_per_byte(log_likelihood: float, answer: str) -> float | None:
    """`log_likelihood` in nats. None of an answer without text."""
    num_bytes = len(answer.lstrip().encode())
    return -log_likelihood / math.log(2) / num_bytes if num_bytes else None


def right_choice(target: Any, choices: Sequence[str]) -> int | None:
    """Position of the right choice as lm-eval reads a target: a position, a choice, or a list of either (the first)."""
    if isinstance(target, (list, tuple)):
        return next((found for one in target if (found := right_choice(one, choices)) is not None), None)
    if isinstance(target, str):
        return choices.index(target) if target in choices else None
    if isinstance(target, (int, float)) and int(target) == target and 0 <= target < len(choices):
        return int(target)
    return None


def right_answer(leaf: Any, doc: Mapping[str, Any]) -> str | None:
    """The text that answers an item of a task that generates; None where the task has none (IFEval has a number)."""
    if leaf.task_name in _NO_ANSWERS:
        return None
    if leaf.config.unsafe_code:
        target = doc.get(_CODE_ANSWER)
    else:
        target = leaf.doc_to_target(doc)
        if isinstance(target, int) and leaf.config.doc_to_choice is not None:
            target = leaf.doc_to_choice(doc)[target]
    if isinstance(target, (list, tuple)):
        target = next(iter(target), None)
    return target if isinstance(target, str) and target.strip() else None


def answer_requests(leaf: Any, *, chat: bool) -> list[Instance]:
    """A request for the log-likelihood of each right answer of a task that generates. Its `doc_id` names the item."""
    from lm_eval.api.instance import Instance

    if leaf.get_config("output_type") != "generate_until":
        return []
    before = "" if chat and not leaf.get_config("gen_prefix") else leaf.get_config("target_delimiter") or ""
    requests = []
    for asked in leaf.instances:
        answer = right_answer(leaf, asked.doc)
        if answer is not None:
            pair = (asked.args[0], before + answer)  # as in lm-eval's examples
            requests.append(Instance("loglikelihood", asked.doc, pair, 0, (leaf.task_name, asked.doc_id, 1)))
    return requests


def add_bits_per_byte(model: Any, leaves: Sequence[Any], results: dict[str, Any], *, chat: bool) -> None:
    """Put the metric into lm-eval's `results`: into each sample, and a mean for each task, group and filter.

    An answer longer than the model reads has none: only a part of it was scored.
    """
    asked = {_item(one): one for leaf in leaves for one in answer_requests(leaf, chat=chat)}
    scored: dict[_Item, _Scored] = {}
    for leaf in leaves:
        for sample in results["samples"][leaf.task_name]:
            if METRIC not in sample and (one := _of_sample(leaf, sample)) is not None:
                scored[leaf.task_name, sample["doc_id"]] = one
    spaces = _space_requests(model, asked, scored) if chat else {}
    # Those of an item follow each other: one pass over the prompt is enough for both.
    both = [kind[item] for item in dict.fromkeys([*asked, *scored]) for kind in (asked, spaces) if item in kind]
    answers = dict(zip(map(id, both), model.loglikelihood(both, disable_tqdm=True), strict=True)) if both else {}
    scored |= {item: _Scored(float(answers[id(one)][0]), *one.args) for item, one in asked.items()}
    for item, one in spaces.items():
        scored[item] = scored[item]._replace(nats=scored[item].nats - float(answers[id(one)][0]))
    for leaf in leaves:
        values: dict[str, list[float]] = {}
        samples = results["samples"][leaf.task_name]
        for sample in samples:
            one = scored.get((leaf.task_name, sample["doc_id"]))
            if METRIC in sample or one is None or _is_cut(model, one.answer):
                continue
            value = bits_per_byte(one.nats, one.answer)
            if value is not None:
                sample[METRIC] = value
                sample["metrics"] = [*sample["metrics"], METRIC]
                values.setdefault(sample["filter"], []).append(value)
        for name, found in values.items():
            results["results"][leaf.task_name] |= _mean_and_stderr(found, name)
        if values:
            results.get("higher_is_better", {}).setdefault(leaf.task_name, {})[METRIC] = False


def add_to_group(group: str, leaves: Sequence[Any], results: dict[str, Any], metric: str) -> None:
    """The group's mean, of the filter of `metric` (`acc,none`), with the group's weights: of members or of items.

    Where a value of the group is the plain mean of its members', so is this one.
    """
    of_filter = metric.partition(",")[2]
    key, error_key = f"{METRIC},{of_filter}", f"{METRIC}_stderr,{of_filter}"
    members = [results["results"][leaf.task_name] for leaf in leaves]
    whole = results.get("groups", {}).get(group)
    if not whole or not members or not all(key in member for member in members):
        return
    sizes = [float(results["n-samples"][leaf.task_name]["effective"]) for leaf in leaves]
    known = [name for name in whole if name.endswith(f",{of_filter}") and all(name in member for member in members)]
    name = metric if metric in known else next(iter(known), None)
    if name is None:
        return
    if math.isclose(math.fsum(member[name] for member in members) / len(members), whole[name], abs_tol=1e-9):
        sizes = [1.0] * len(members)
    shares = [size / sum(sizes) for size in sizes]
    whole[key] = math.fsum(share * member[key] for share, member in zip(shares, members, strict=True))
    errors = [member[error_key] for member in members]
    if all(isinstance(error, float) for error in errors):
        whole[error_key] = math.hypot(*(share * error for share, error in zip(shares, errors, strict=True)))


def _item(request: Instance) -> _Item:
    return str(request.task_name), int(request.doc_id)


def _space_requests(
    model: Any, asked: Mapping[_Item, Instance], scored: Mapping[_Item, _Scored]
) -> dict[_Item, Instance]:
    """A request for the white space that ends a prompt, where it is tokens of its own and not part of the answer's."""
    from lm_eval.api.instance import Instance

    pairs = {item: one.args for item, one in asked.items()} | {item: one[1:] for item, one in scored.items()}
    requests = {}
    for item, (prompt, answer) in pairs.items():
        bare = prompt.rstrip()
        if bare == prompt or not bare:
            continue
        ids, before = model.tok_encode(prompt), model.tok_encode(bare)
        if ids[: len(before)] == before and model.tok_encode(prompt + answer)[: len(ids)] == ids:
            task, doc_id = item
            requests[item] = Instance("loglikelihood", {}, (bare, prompt[len(bare) :]), 0, (task, doc_id, 1))
    return requests


def _of_sample(leaf: Any, sample: Mapping[str, Any]) -> _Scored | None:
    """The right answer of a task whose answers are log-likelihoods."""
    kind = leaf.get_config("output_type")
    if kind == "loglikelihood":
        place: int | None = 0
    elif kind == "multiple_choice":
        # Where contexts differ and the continuation is one, lm-eval keeps the right position in the text's place.
        target = leaf.doc_to_text(sample["doc"]) if leaf.multiple_input else sample["target"]
        place = right_choice(target, list(leaf.doc_to_choice(sample["doc"])))
    else:
        return None
    if place is None or place >= len(sample["resps"]):
        return None
    prompt, answer = sample["arguments"][place]
    return _Scored(float(sample["resps"][place][0][0]), str(prompt), str(answer))


def _is_cut(model: Any, text: str) -> bool:
    # A token has a byte at least.
    return len(text.encode()) > model.max_length and len(model.tok_encode(text)) > model.max_length


def _mean_and_stderr(values: Sequence[float], of_filter: str) -> dict[str, Any]:
    mean = math.fsum(values) / len(values)
    stderr: Any = "N/A"
    if len(values) > 1:
        stderr = math.sqrt(math.fsum((one - mean) ** 2 for one in values) / (len(values) - 1) / len(values))
    return {f"{METRIC},{of_filter}": mean, f"{METRIC}_stderr,{of_filter}": stderr}
