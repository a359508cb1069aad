"""What the definitions paper_*.yaml cannot say in YAML: items, examples and scores of SmolLM2's model card.

The sources are huggingface/smollm @ a041759, text/evaluation/smollm2/tasks.py, and huggingface/lighteval @ ea46419. As
there, the items of every task are shuffled by Random(42): `limit` takes a random part, and the same one as lighteval.

A loader gets the Hub's `repository`, `revision` and `subset`, or local files as `sources`, and gives the split `test`.
An item carries its examples (`shots`): they do not depend on the order in which items are asked.
"""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

from lm_eval.api.samplers import ContextSampler

from smoltulu.tasks.evaluation.local_files import file_rows

Row = dict[str, Any]

NUM_GSM8K_SHOTS, NUM_BBH_SHOTS = 5, 3
_SHUFFLE_SEED, _BBH_SEED = 42, 0  # lighteval_task.create_requests_from_tasks, FewShotSampler
_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")  # lighteval normalizations.gsm8k_normalizer
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# Order and examples, as numbers of rows.


def document_order(num_documents: int) -> list[int]:
    """The order in which lighteval asks the items."""
    return _shuffled(num_documents)[0]


def gsm8k_draws(num_documents: int, num_train: int, num_shots: int) -> tuple[list[int], list[list[int]]]:
    """Order of the documents, and the rows of `train` that each gets, in that order: one generator gives both."""
    order, generator = _shuffled(num_documents)
    return order, [generator.sample(range(num_train), num_shots) for _ in order]


def balanced_rows(targets: Sequence[str], num_rows: int) -> list[int]:
    """Rows for examples: one of each target in turn, the most frequent target first (ties at random)."""
    generator = random.Random(_BBH_SEED)
    rows_of: dict[str, list[int]] = defaultdict(list)
    for number, target in enumerate(targets):
        rows_of[target].append(number)
    with_count: dict[int, list[str]] = defaultdict(list)
    for target in sorted(rows_of):
        with_count[len(rows_of[target])].append(target)
    in_turn: list[str] = []
    for count in sorted(with_count, reverse=True):
        generator.shuffle(with_count[count])
        in_turn += with_count[count]
    drawn: list[int] = []
    for target in cycle(in_turn):
        if len(drawn) == min(num_rows, len(targets)):
            break
        if rows_of[target]:
            drawn.append(rows_of[target].pop(generator.randrange(len(rows_of[target]))))
    return drawn


def _shuffled(num_documents: int) -> tuple[list[int], random.Random]:
    generator = random.Random(_SHUFFLE_SEED)
    order = list(range(num_documents))
    generator.shuffle(order)
    return order, generator


class OwnExamples(ContextSampler):
    """Gives an item the examples that it carries."""

    def sample(self, n: int, eval_doc: Row | None = None, df: Any = None, **_: Any) -> list[Row]:
        assert eval_doc is not None, "fewshot_split is test_split"
        shots: list[Row] = eval_doc["shots"]
        if len(shots) < n:
            raise ValueError(
                f"num_fewshot {n}: an item of this task comes with {len(shots)} examples. Set num_fewshot to "
                f"{len(shots)} or fewer, or leave it out" + ("" if shots else "; examples need the split 'train'")
            )
        return shots[:n]


# Items.


def arc(split: str, **given: Any) -> Any:
    """{question, choices, gold}; of the Hub's rows, or of local {query: "Question: ...", choices, gold}."""

    def item(row: Row) -> Row:
        if "query" in row:
            return {"question": row["query"].removeprefix("Question: "), **_choices(row["choices"], row["gold"])}
        labels = list(row["choices"]["label"])
        return {"question": row["question"], **_choices(row["choices"]["text"], labels.index(row["answerKey"]))}

    return _items(_rows(split, hub_split="test", **given), item)


def piqa(**given: Any) -> Any:
    """{goal, choices, gold}. Local files may give the labels as rows of their own, one a line."""
    rows = _rows("validation", **given)
    if "labels" in (given.get("sources") or {}):
        labels = [row["text"] for row in _rows("labels", **given)]
        if len(labels) != len(rows):
            raise ValueError(f"paper_piqa: {len(rows)} rows, {len(labels)} labels; they must match by line")
        rows = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
    return _items(rows, lambda row: {"goal": row["goal"], **_choices([row["sol1"], row["sol2"]], row["label"])})


def hellaswag(**given: Any) -> Any:
    """{query, choices, gold}."""

    def item(row: Row) -> Row:
        query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()} "
        return {"query": wikihow_text(query), **_choices(map(wikihow_text, row["endings"]), row["label"])}

    return _items(_rows("validation", **given), item)


def wikihow_text(text: str) -> str:
    """HellaSwag's text without the marks that WikiHow left in it."""
    return re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).replace("  ", " ")


def mmlu_pro(**given: Any) -> Any:
    """{question, options, category, choices, gold}; the choices are letters."""

    def item(row: Row) -> Row:
        asked = {name: row[name] for name in ("question", "options", "category")}
        _choices(row["options"], row["answer_index"])  # checks them
        return {**asked, "choices": list(LETTERS[: len(row["options"])]), "gold": int(row["answer_index"])}

    return _items(_rows("test", **given), item)


def gsm8k(**given: Any) -> Any:
    """{question, answer, shots}; without examples where local files have no `train`."""
    rows = [_problem(row) for row in _rows("test", **given)]
    sources = given.get("sources")
    has_train = sources is None or "train" in sources
    train = [_problem(row) for row in _rows("train", **given)] if has_train else []
    order, draws = gsm8k_draws(len(rows), len(train), min(NUM_GSM8K_SHOTS, len(train)))
    return _dataset(
        [{**rows[at], "shots": [train[one] for one in shots]} for at, shots in zip(order, draws, strict=True)]
    )


def _problem(row: Row) -> Row:
    if number_of(row["answer"]) is None:
        raise ValueError(f"paper_gsm8k: an answer must hold `#### ` and a number; got {row['answer'][-80:]!r}")
    return {"question": row["question"], "answer": row["answer"]}


def bbh(subset: str, **given: Any) -> Any:
    """{input, target, shots} of one subset; local files have all subsets, named in `task`."""
    if given.get("sources") is None:
        given["file"] = f"data/{subset}.json"
    rows = [
        {"input": row["input"], "target": row["target"]}
        for row in _rows("test", **given)
        if row.get("task", subset) == subset
    ]
    if not rows:
        raise ValueError(
            f"paper_bbh: no row has the task {subset!r}; the split 'test' needs the rows of all 27 subsets"
        )
    drawn = [rows[at] for at in balanced_rows([row["target"] for row in rows], NUM_BBH_SHOTS + 1)]
    # A row that is the scored one word for word is left out too.
    return _items(rows, lambda row: {**row, "shots": [shot for shot in drawn if shot != row][:NUM_BBH_SHOTS]})


def ifeval(**given: Any) -> Any:
    """{key, prompt, instruction_id_list, kwargs}."""
    names = ("key", "prompt", "instruction_id_list", "kwargs")
    return _items(_rows("test", hub_split="train", **given), lambda row: {name: row[name] for name in names})


def _rows(
    split: str,
    *,
    repository: str | None = None,
    revision: str | None = None,
    subset: str | None = None,
    file: str | None = None,
    hub_split: str | None = None,
    sources: Mapping[str, Any] | None = None,
    world: str | None = None,
    digests: Mapping[str, str] | None = None,
    **_: Any,
) -> list[Row]:
    """The rows of a split, in order. `hub_split`: its name on the Hub. KeyError: local files do not have it."""
    if sources is not None:
        return file_rows(split, sources[split], world, (digests or {}).get(split))
    from datasets import load_dataset

    if file is not None:  # JSON files whose rows stand under `examples`, behind a loading script that is not run
        path = f"hf://datasets/{repository}@{revision}/{file}"
        return list(load_dataset("json", data_files=path, field="examples", split="train"))
    return list(load_dataset(repository, subset, revision=revision, split=hub_split or split))


def _choices(texts: Iterable[str], gold: Any) -> Row:
    """Choices, each behind a space, and the number of the right one."""
    listed = list(texts)
    for number, text in enumerate(listed):
        if not text.strip():
            raise ValueError(
                f"choice {number} of {len(listed)} is empty, so its log-likelihood has no length to be divided by; "
                "every choice needs a text: correct the row or take it out"
            )
    if not 0 <= int(gold) < len(listed):
        raise ValueError(f"the right choice is number {gold}, and there are {len(listed)}, from 0; correct the row")
    return {"choices": [f" {text}" for text in listed], "gold": int(gold)}


def _items(rows: Sequence[Row], item: Callable[[Row], Row]) -> Any:
    """The split `test` of the items that rows become, in lighteval's order. ValueError names the row by its number."""

    def made(number: int) -> Row:
        try:
            return item(rows[number])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"no column {error}; has {sorted(rows[number])}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"row {number + 1} of {len(rows)}: {what}") from error

    return _dataset([made(number) for number in document_order(len(rows))])


def _dataset(items: list[Row]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(items)}


# Scores.


def choice_scores(doc: Row, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Whether the likeliest choice is right: `acc`, and `acc_norm` by characters without the first space.

    White space that lm-eval moves from the end of the prompt in front of a choice is part of the log-likelihood and not
    of the length.
    """
    logliks = [loglik for loglik, *_ in results]
    lengths = [len(choice.removeprefix(" ")) for choice in doc["choices"]]
    per_character = [loglik / length for loglik, length in zip(logliks, lengths, strict=True)]
    return {
        "acc_norm": float(_first_best(per_character) == doc["gold"]),
        "acc": float(_first_best(logliks) == doc["gold"]),
    }


def _first_best(values: Sequence[float]) -> int:
    if any(math.isnan(value) for value in values):
        raise ValueError(f"a log-likelihood is not a number: {values}; the model's weights or precision are at fault")
    return values.index(max(values))


def number_of(text: str) -> str | None:
    """The number behind the first `#### `, without commas: `18.` stays `18.`, which is not 18."""
    found = _NUMBER.search(text)
    return found.group(1).replace(",", "") if found else None


def number_scores(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Whether the number that the filter found is the answer's, as text."""
    return {"exact_match": float(results[0].replace(",", "") == number_of(doc["answer"]))}


def stripped_scores(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Whether the whole output is the target. An output that the limit on its tokens ended is wrong."""
    ended = getattr(results[0], "stop", None) != "length"
    return {"exact_match": float(ended and results[0].strip() == doc["target"].strip())}
