"""The prompts of RLVR as a data set that a trainer reads: messages, which also know the tools that they offer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.data.rows import COLUMNS, TOOLS, given_row, is_rich_file, open_rows
from smoltulu.tasks.models.tokens import prompt_ids
from smoltulu.tasks.models.turns import Messages, Prompt, tools_of
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.loop import load_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_prompts(file: str, context: StageContext) -> Dataset:
    """Rows {"id", "prompt": messages, "verifier", "ground_truth"} of a preflight.

    Where rows have more than role and content, every prompt is a `Prompt`, with what it was given and no more, and the
    column `tools` is kept, as JSON: see `with_tools`.
    """
    columns = list(COLUMNS["rlvr"])
    with open_rows(Path(file)) as opened:
        is_rich = is_rich_file(opened)
    if not is_rich:
        return load_rows(file, context, columns)
    return load_rows(file, context, [*columns, TOOLS]).with_transform(_with_prompts)


def _with_prompts(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Columns of a rich file, its prompts as they were given."""
    if "prompt" not in batch:
        return batch
    prompts = []
    for place, messages in enumerate(batch["prompt"]):
        tools = batch[TOOLS][place] if TOOLS in batch else ""
        row = given_row({"prompt": messages, TOOLS: tools})
        prompts.append(Prompt(row["prompt"], row.get(TOOLS)))
    return batch | {"prompt": prompts}


def with_tools(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as a data loader gives them: accelerate made plain lists of their prompts."""
    return [
        row | {"prompt": Prompt(row["prompt"], json.loads(row[TOOLS] or "null"))} if TOOLS in row else row
        for row in rows
    ]


def ids_of_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages]) -> list[list[int]]:
    """Token ids of prompts, each with its own tools."""
    return prompt_ids(tokenizer, prompts, [tools_of(prompt) for prompt in prompts])
