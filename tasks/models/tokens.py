"""From rows of messages to the tokens that are trained on. Pure: a tokenizer and rows in, lists of ids out.

The tokens between the chat template's generation markers carry a loss: the assistant's content and the eos that closes
it (open-instruct `dataset_transformation.py`, sft_tulu_tokenize_and_truncate_v1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.training import Overlong, TrainedTurns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
IGNORED = -100


@dataclass(frozen=True)
class Conversation:
    """One row of SFT. `stable`: it starts with the tokens that generation would see for its last prompt."""

    input_ids: list[int]
    mask: list[int]
    stable: bool

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def sides(self) -> list[tuple[list[int], list[int]]]:
        """Token ids and mask of the one sequence that the row is."""
        return [(self.input_ids, self.mask)]

    @property
    def labels(self) -> list[int]:
        """input_ids where they are trained on, else -100."""
        return [token if trained else IGNORED for token, trained in zip(self.input_ids, self.mask, strict=True)]


@dataclass(frozen=True)
class Pair:
    """One preference pair: completions follow the prompt; masks are 1 where a token counts."""

    prompt_ids: list[int]
    prompt_mask: list[int]
    chosen_ids: list[int]
    chosen_mask: list[int]
    rejected_ids: list[int]
    rejected_mask: list[int]
    stable: bool

    @property
    def length(self) -> int:
        """Tokens of the longer side, prompt included."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def sides(self) -> list[tuple[list[int], list[int]]]:
        """Token ids and mask of both completions, each after the prompt."""
        return [
            (self.prompt_ids + self.chosen_ids, self.prompt_mask + self.chosen_mask),
            (self.prompt_ids + self.rejected_ids, self.prompt_mask + self.rejected_mask),
        ]


def conversations(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Messages]) -> list[Conversation]:
    """The tokens of every row, nothing cut."""
    wholes = _rendered(tokenizer, rows)
    # A row that ends with a user's turn is compared as a whole: it has no last answer to leave out.
    prompts = [row[:-1] if row[-1]["role"] == "assistant" else row for row in rows]
    asked = prompt_ids(tokenizer, prompts)
    return [
        Conversation(ids, mask, ids[: len(prompt)] == prompt or row[-1]["role"] != "assistant")
        for row, (ids, mask), prompt in zip(rows, wholes, asked, strict=True)
    ]


def pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Messages]], trained_turns: TrainedTurns
) -> list[Pair]:
    """The tokens of every pair, nothing cut. Rows: {"prompt", "chosen", "rejected"}, each a list of messages.

    The completions begin where the prompt, as generation would see it, ends, or where the tokens first differ from it.
    trained_turns  last: the completions only; all: the assistant's turns in the prompt too (open-instruct)
    """
    asked = prompt_ids(tokenizer, [row["prompt"] for row in rows])
    chosen = _rendered(tokenizer, [row["prompt"] + row["chosen"] for row in rows])
    rejected = _rendered(tokenizer, [row["prompt"] + row["rejected"] for row in rows])
    made = []
    for prompt, (chosen_ids, chosen_mask), (rejected_ids, rejected_mask) in zip(asked, chosen, rejected, strict=True):
        cut = min(_common_prefix(prompt, chosen_ids), _common_prefix(prompt, rejected_ids))
        prompt_mask = chosen_mask[:cut] if trained_turns == "all" else [0] * cut
        made.append(
            Pair(
                prompt_ids=chosen_ids[:cut],
                prompt_mask=prompt_mask,
                chosen_ids=chosen_ids[cut:],
                chosen_mask=chosen_mask[cut:],
                rejected_ids=rejected_ids[cut:],
                rejected_mask=rejected_mask[cut:],
                stable=cut == len(prompt),
            )
        )
    return made


def fit_conversation(row: Conversation, max_length: int, overlong: Overlong) -> Conversation | None:
    """The row within `max_length` tokens; None where it is dropped, or where nothing is left to train on."""
    if row.length > max_length:
        if overlong == "drop":
            return None
        row = replace(row, input_ids=row.input_ids[:max_length], mask=row.mask[:max_length])
    # The first token has no prediction.
    return row if any(row.mask[1:]) else None


def fit_pair(row: Pair, max_length: int, overlong: Overlong) -> Pair | None:
    """The pair within `max_length` tokens a side; None where it is dropped, or a side has nothing left that counts."""
    if row.length > max_length:
        if overlong == "drop":
            return None
        room = max(max_length - len(row.prompt_ids), 0)
        row = replace(
            row,
            chosen_ids=row.chosen_ids[:room],
            chosen_mask=row.chosen_mask[:room],
            rejected_ids=row.rejected_ids[:room],
            rejected_mask=row.rejected_mask[:room],
        )
    return row if any(row.chosen_mask) and any(row.rejected_mask) else None


def _rendered(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Messages]) -> list[tuple[list[int], list[int]]]:
    """Token ids and assistant mask of whole conversations."""
    made = _template(tokenizer, rows, return_assistant_tokens_mask=True)
    return list(zip(made["input_ids"], made["assistant_masks"], strict=True))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Messages]) -> list[list[int]]:
    """Token ids of conversations that the model is to continue, as generation renders them."""
    made: list[list[int]] = _template(tokenizer, rows, add_generation_prompt=True)["input_ids"]
    return made


def _template(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Messages], **kwargs: Any) -> Any:
    if not rows:
        return {"input_ids": [], "assistant_masks": []}
    return tokenizer.apply_chat_template(list(rows), tokenize=True, return_dict=True, padding=False, **kwargs)


def _common_prefix(one: list[int], other: list[int]) -> int:
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return min(len(one), len(other))
