"""From rows of messages to the tokens that are trained on. Pure: a tokenizer and rows in, lists of ids out.

The tokens between the chat template's generation markers carry a loss: the assistant's content and the token that
closes its turn (open-instruct `dataset_transformation.py`, sft_tulu_tokenize_and_truncate_v1). Those of a turn with
`train` false carry none. A conversation with tools, tool calls or reasoning is refused where the template would leave
a text of it out (tasks/models/turns.py).

Every stage gets its ids from here. Libraries that tokenise by themselves (TRL's rollouts, lm-eval, whoever loads the
published model) are compared with it on `PROBES` when they are set up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.training import Overlong, TrainedTurns
from smoltulu.tasks.models.turns import (
    Messages,
    Tools,
    as_rendered,
    check_rendered,
    is_plain,
    trained_spans,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
#: Key of the file's metadata under which the rows of a preflight name their tokenisation.
TOKENISATION = b"smoltulu.tokenisation"

_USER = {"role": "user", "content": "  How many legs have 12 cats, 3 birds\nand a naïve “ant”?  "}
_ASSISTANT = {"role": "assistant", "content": "12 × 4 + 3 × 2 + 6 = 60\n\n#### 60"}
#: Prompts on which two ways of tokenising are compared.
PROBES: tuple[Messages, ...] = (
    [_USER],
    [{"role": "system", "content": "You count. Answer\tbriefly."}, _USER],
    [_USER, _ASSISTANT, _USER],
)


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


def conversations(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Messages], tools: Sequence[Tools | None] | None = None
) -> list[Conversation]:
    """The tokens of every row, nothing cut. `tools`: what each row offers; none of them any, where not given."""
    wholes = _rendered(tokenizer, rows, tools)
    # A row that ends with a user's turn is compared as a whole: it has no last answer to leave out.
    prompts = [row[:-1] if row[-1]["role"] == "assistant" else row for row in rows]
    asked = _asked_ids(tokenizer, prompts, tools)
    return [
        Conversation(ids, mask, ids[: len(prompt)] == prompt or row[-1]["role"] != "assistant")
        for row, (ids, mask), prompt in zip(rows, wholes, asked, strict=True)
    ]


def pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], trained_turns: TrainedTurns
) -> list[Pair]:
    """The tokens of every pair, nothing cut. Rows: {"prompt", "chosen", "rejected"}, lists of messages, and tools.

    The completions begin where the prompt, as generation would see it, ends, or where the tokens first differ from it.
    trained_turns  last: the completions only; all: the assistant's turns in the prompt too (open-instruct)
    """
    tools = [row.get("tools") for row in rows]
    chosen = _rendered(tokenizer, [row["prompt"] + row["chosen"] for row in rows], tools)
    rejected = _rendered(tokenizer, [row["prompt"] + row["rejected"] for row in rows], tools)
    asked = _asked_ids(tokenizer, [row["prompt"] for row in rows], tools)
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


def _rendered(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Messages], tools: Sequence[Tools | None] | None = None
) -> list[tuple[list[int], list[int]]]:
    """Token ids of whole conversations, and whether each is trained on."""
    offered = tools or [None] * len(rows)
    are_plain = [is_plain(row, own) for row, own in zip(rows, offered, strict=True)]
    made = _template(tokenizer, [row for row, plain in zip(rows, are_plain, strict=True) if plain], mask=True)
    batch = zip(made["input_ids"], made["assistant_masks"], strict=True)
    return [
        next(batch) if plain else _rendered_rich(tokenizer, row, own)
        for row, own, plain in zip(rows, offered, are_plain, strict=True)
    ]


def _rendered_rich(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools | None
) -> tuple[list[int], list[int]]:
    """A conversation that is not plain."""
    spans = trained_spans(tokenizer, messages, tools)
    made = _template(tokenizer, [as_rendered(messages)], tools, mask=True)
    (ids,), (mask,) = made["input_ids"], made["assistant_masks"]
    if spans is None:
        return ids, mask
    kept = [0] * len(ids)
    for start, end in spans:
        first, last = made.char_to_token(0, start), made.char_to_token(0, end - 1)
        assert first is not None and last is not None, (start, end)
        kept[first : last + 1] = mask[first : last + 1]
    return ids, kept


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Messages], tools: Sequence[Tools | None] | None = None
) -> list[list[int]]:
    """Token ids of conversations that the model is to continue, as generation renders them."""
    for row, own in zip(rows, tools or [None] * len(rows), strict=True):
        if not is_plain(as_rendered(row), own):
            check_rendered(tokenizer, row, own)
    return _asked_ids(tokenizer, rows, tools)


def _asked_ids(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Messages], tools: Sequence[Tools | None] | None
) -> list[list[int]]:
    """As `prompt_ids`, whether or not all text is there."""
    offered = tools or [None] * len(rows)
    made: list[list[int]] = [[] for _ in rows]
    without = [place for place, own in enumerate(offered) if not own]
    batch = _template(tokenizer, [as_rendered(rows[place]) for place in without], add_generation_prompt=True)
    for place, ids in zip(without, batch["input_ids"], strict=True):
        made[place] = ids
    for place, own in enumerate(offered):
        if own:
            (made[place],) = _template(tokenizer, [as_rendered(rows[place])], own, add_generation_prompt=True)[
                "input_ids"
            ]
    return made


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: eos, and what the template closes the assistant's turns with where that is another.

    A template may close its last turn otherwise than those before it.
    """
    stops = {tokenizer.eos_token_id: None}
    for ids, mask in _taken(tokenizer, [_USER, _ASSISTANT], [_USER, _ASSISTANT, _USER, _ASSISTANT]):
        for is_trained, turn in groupby(zip(ids, mask, strict=True), key=lambda token: bool(token[1])):
            # The line's end that ChatML writes after its token is no part of the answer, wherever it is marked.
            said = [token for token, _ in turn if tokenizer.decode([token]).strip()] if is_trained else []
            if said and said[-1] in tokenizer.added_tokens_decoder:
                stops[said[-1]] = None
    return list(stops)


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and behind a text by itself. Nothing here does so to a conversation."""
    text = "probe"
    plain, called = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
    for place in range(len(called) - len(plain) + 1):
        if called[place : place + len(plain)] == plain:
            return called[:place], called[place + len(plain) :]
    return [], []


def tokenisation(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what a tokenizer and its template make of the probes: ids, trained tokens, prompts."""
    made: list[Any] = []
    for probe in PROBES:
        made += [_taken(tokenizer, [*probe, _ASSISTANT]), [list(ids) for ids in _asked(tokenizer, probe)]]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def check_prompts(
    tokenizer: PreTrainedTokenizerBase, who: str, encode: Callable[[list[Messages]], list[list[int]]]
) -> None:
    """RuntimeError where a library's prompts have other ids than `prompt_ids`. A probe that the template refuses is
    left out."""
    for probe in PROBES:
        for ours in _asked(tokenizer, probe):
            (theirs,) = encode([probe])
            if list(theirs) != ours:
                raise RuntimeError(
                    f"{who} gives a conversation other tokens than training: {tokenizer.decode(theirs)!r} "
                    f"({len(theirs)} tokens) instead of {tokenizer.decode(ours)!r} ({len(ours)} tokens)"
                )


def _asked(tokenizer: PreTrainedTokenizerBase, probe: Messages) -> list[list[int]]:
    """Ids of a prompt; none where the template refuses it."""
    try:
        return prompt_ids(tokenizer, [probe])
    except rendering_errors():
        return []


def _taken(tokenizer: PreTrainedTokenizerBase, *rows: Messages) -> list[tuple[list[int], list[int]]]:
    """Ids and mask of the conversations that the template takes."""
    made = []
    for row in rows:
        try:
            made += _rendered(tokenizer, [row])
        except rendering_errors():
            continue
    return made


def rendering_errors() -> tuple[type[Exception], ...]:
    """What a chat template raises on a conversation that it refuses."""
    import jinja2

    return (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError)


def _template(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Messages],
    tools: Tools | None = None,
    *,
    mask: bool = False,
    add_generation_prompt: bool = False,
) -> Any:
    """Conversations that offer the same tools, in one call."""
    if not rows:
        return {"input_ids": [], "assistant_masks": []}
    return tokenizer.apply_chat_template(
        list(rows),
        tools=tools or None,
        tokenize=True,
        return_dict=True,
        padding=False,
        return_assistant_tokens_mask=mask,
        add_generation_prompt=add_generation_prompt,
    )


def _common_prefix(one: list[int], other: list[int]) -> int:
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return min(len(one), len(other))
