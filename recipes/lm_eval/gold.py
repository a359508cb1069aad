"""Items of the definitions gold_*.yaml: how likely is the right answer? Nothing is generated, so it costs one pass.

`bits_per_byte` is the score; `acc` says whether greedy decoding would begin with the answer. For sweeps: bits move
where accuracy is at its floor, and hundreds of models can be asked. Loaders give the split `test` of the Hub's dataset
or of local files, shuffled: a limit takes a random part.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

from smoltulu.tasks.evaluation.local_files import file_rows

Row = dict[str, Any]

#: BIG-Bench Hard's algorithmic subsets: eleven tasks, two of them in three sizes. Source: Suzgun et al. 2022,
#: arXiv:2210.09261, as recalled; its table was not at hand.
ALGORITHMIC = (
    "boolean_expressions",
    "dyck_languages",
    "geometric_shapes",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)


def gsm8k(**given: Any) -> Any:
    """{question, answer}: the worked solution, with its `#### number`."""
    return _items([{"question": row["question"], "answer": row["answer"]} for row in _rows(**given)])


def math(subsets: Sequence[str], **given: Any) -> Any:
    """{problem, answer}: the worked solution. Local files have the rows of all `subsets` of the Hub."""
    here = given.get("sources") is not None
    rows = _rows(**given) if here else chain.from_iterable(_rows(subset=subset, **given) for subset in subsets)
    return _items([{"problem": row["problem"], "answer": row["solution"]} for row in rows])


def bbh(**given: Any) -> Any:
    """{input, answer} of the algorithmic subsets in turn, so that a limit takes equally many of each.

    Local files: {task, input, target}.
    """
    if given.get("sources") is not None:
        rows = _rows(**given)
        of_subsets = [[row for row in rows if row["task"] == subset] for subset in ALGORITHMIC]
    else:  # JSON files whose rows stand under `examples`, behind a loading script that is not run
        of_subsets = [_rows(file=f"data/{subset}.json", **given) for subset in ALGORITHMIC]
    if missing := [subset for subset, rows in zip(ALGORITHMIC, of_subsets, strict=True) if not rows]:
        raise ValueError(
            f"gold_bbh: no row has the task {missing[0]!r}; the split 'test' needs {', '.join(ALGORITHMIC)}"
        )
    shuffled = [_shuffled([{"input": row["input"], "answer": row["target"]} for row in rows]) for rows in of_subsets]
    return _dataset([row for turn in zip_longest(*shuffled) for row in turn if row is not None])


def chat(**given: Any) -> Any:
    """{prompt, answer} of conversations that begin with a user's turn and the assistant's, without what follows.

    Rows {messages}, or {prompt, completion}.
    """
    items = []
    for row in _rows(**given):
        if "messages" in row:
            first = row["messages"][:2]
            if [turn["role"] for turn in first] != ["user", "assistant"]:
                continue
            prompt, answer = (turn["content"] for turn in first)
        else:
            prompt, answer = row["prompt"], row["completion"]
        if prompt.strip() and answer.strip():
            items.append({"prompt": prompt, "answer": answer.strip()})
    return _items(items)


def _rows(
    *,
    repository: str | None = None,
    revision: str | None = None,
    subset: str | None = None,
    file: str | None = None,
    sources: Any = None,
    world: str | None = None,
    digests: Any = None,
    **_: Any,
) -> list[Row]:
    if sources is not None:
        return file_rows("test", sources["test"], world, (digests or {}).get("test"))
    from datasets import load_dataset

    if file is not None:
        path = f"hf://datasets/{repository}@{revision}/{file}"
        return list(load_dataset("json", data_files=path, field="examples", split="train"))
    return list(load_dataset(repository, subset, revision=revision, split="test"))


def _items(items: list[Row]) -> Any:
    return _dataset(_shuffled(items))


def _shuffled(items: list[Row]) -> list[Row]:
    return random.Random(42).sample(items, len(items))


def _dataset(items: list[Row]) -> Any:
    from datasets import Dataset

    return {"test": Dataset.from_list(items)}
