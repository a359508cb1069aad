"""A row of the preflight: its tokens, and the checks for its faults."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.preflight import PreflightConfig, TokenizerFacts
from smoltulu.tasks.data.rows import TOOLS, texts_of, turns_of
from smoltulu.tasks.models.chat_template import PROBE
from smoltulu.tasks.models.tokens import (
    Conversation,
    Pair,
    added_tokens,
    conversations,
    fit_conversation,
    fit_pair,
    pairs,
    prompt_ids,
    rendering_errors,
    stop_token_ids,
    tokenisation,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_TOKENS = 600


@dataclass(frozen=True)
class Tokenised:
    """A row as it is written, nothing cut. An RLVR prompt is a conversation: no token of it carries a loss."""

    number: int
    source: dict[str, Any]
    whole: Conversation | Pair


@dataclass(frozen=True)
class Shown:
    """A row for the report: of each side (token text, whether it is trained on), and how many tokens are left out."""

    number: int
    sides: list[list[tuple[str, bool]]]
    num_left_out: int


@dataclass(frozen=True)
class TokenizerProbe:
    """What rows are compared with: facts of the tokenizer, and special tokens and template headers as text.

    `after_stop`: tokens that the template trains after the end of a turn, as the line's end in many ChatML templates.
    """

    facts: TokenizerFacts
    special: tuple[str, ...]
    headers: tuple[str, ...]
    after_stop: frozenset[int] = frozenset()

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, model: Path) -> TokenizerProbe:
        """From a tokenizer with its template, and the config.json of the base model."""
        config = json.loads((model / "config.json").read_text())
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = tuple(sorted(added | set(tokenizer.all_special_tokens)))
        for turns in (PROBE, PROBE[1:]):  # some templates take no system turn
            try:
                text = tokenizer.apply_chat_template(turns, tokenize=False)
                break
            except rendering_errors() as error:
                refused = error
        else:
            raise ValueError(f"the chat template renders no conversation with this tokenizer: {refused}")
        bos = tokenizer.bos_token_id
        begins = tokenizer(text)["input_ids"][:2]
        before, after = added_tokens(tokenizer)
        stops = stop_token_ids(tokenizer)
        (example,) = conversations(tokenizer, [turns])
        said = [token for token, trained in zip(example.input_ids, example.mask, strict=True) if trained]
        behind = list(takewhile(lambda token: token not in stops, reversed(said)))
        facts = TokenizerFacts(
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=bos,
            adds_bos=bos is not None and begins == [bos, bos],
            adds_before=tokenizer.decode(before),
            adds_after=tokenizer.decode(after),
            begins_with=tokenizer.decode(example.input_ids[:1]),
            stop_token_ids=tuple(stops),
            tokenisation=tokenisation(tokenizer),
            num_embeddings=config.get("vocab_size"),
            max_position_embeddings=config.get("max_position_embeddings"),
        )
        after_stop = frozenset(behind if len(behind) < len(said) else ())
        return TokenizerProbe(facts, special, _headers(text, turns, special), after_stop)


def _headers(probe: str, turns: Sequence[dict[str, str]], special: Sequence[str]) -> tuple[str, ...]:
    """What a template writes before a turn, without special tokens: `<|user|>` for Tulu.

    A word that is a header between special tokens only, as ChatML's `user`, is none by itself.
    """
    found = []
    for turn in turns:
        header, _, probe = probe.partition(turn["content"])
        for token in special:
            header = header.replace(token, "")
        if re.search(r"[^\w\s]", header):
            found.append(header.strip())
    return tuple(found)


def tokenised(
    config: PreflightConfig,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[int, dict[str, Any]]],
    refuse: Callable[[int, dict[str, Any], Exception], None],
) -> list[Tokenised]:
    """The rows of a batch that the template renders. `refuse` gets each of the others."""
    rows = [row for _, row in batch]
    tools = [row.get(TOOLS) for row in rows]
    try:
        made: list[Any]
        if config.kind == "conversations":
            made = conversations(tokenizer, [row["messages"] for row in rows], tools)
        elif config.kind == "pairs":
            made = pairs(tokenizer, rows, config.trained_turns)
        else:
            asked = prompt_ids(tokenizer, [row["prompt"] for row in rows], tools)
            made = [Conversation(ids, [0] * len(ids), stable=True) for ids in asked]
        return [Tokenised(number, row, whole) for (number, row), whole in zip(batch, made, strict=True)]
    except rendering_errors() as error:
        if len(batch) > 1:
            return [row for single in batch for row in tokenised(config, tokenizer, [single], refuse)]
        refuse(*batch[0], error)
        return []


def fit(config: PreflightConfig, whole: Conversation | Pair) -> Conversation | Pair | None:
    """The row within max_length; None where it is dropped, or where nothing is left to train on."""
    if config.kind == "prompts":
        return whole if whole.length <= config.max_length else None
    if isinstance(whole, Pair):
        return fit_pair(whole, config.max_length, config.overlong)
    return fit_conversation(whole, config.max_length, config.overlong)


def findings(config: PreflightConfig, probe: TokenizerProbe, row: Tokenised) -> list[str]:
    """Findings of a row as it is written."""
    facts, sides = probe.facts, row.whole.sides
    bos, num_embeddings = facts.bos_token_id, facts.num_embeddings
    texts = texts_of(row.source)
    special = [role for role, text in texts if any(token in text for token in probe.special)]
    ends = [ids[last - 1] for ids, mask in sides if (last := last_said(probe, ids, mask))]
    found = {
        "num_unstable": not row.whole.stable,
        "num_special": bool(special),
        "num_special_trained": "assistant" in special,
        "num_headers": any(header in text for _, text in texts for header in probe.headers),
        "num_two_bos": bos is not None and any(ids[:2] == [bos, bos] for ids, _ in sides),
        "num_beyond_embeddings": num_embeddings is not None
        and any(max(ids, default=0) >= num_embeddings for ids, _ in sides),
        "num_without_eos": config.kind != "prompts" and any(end not in facts.stop_token_ids for end in ends),
    }
    return [name for name, is_found in found.items() if is_found]


def parts_of(source: dict[str, Any]) -> dict[str, int]:
    """What a row has beside role and content, as counts of Counts."""
    turns = turns_of(source)
    return {
        "num_with_tools": TOOLS in source or any("tool_calls" in turn for turn in turns),
        "num_with_reasoning": any("reasoning_content" in turn for turn in turns),
        "num_untrained_turns": sum(turn["role"] == "assistant" and "train" in turn for turn in turns),
    }


def last_trained(mask: Sequence[int]) -> int:
    """Tokens up to and with the last one that is trained on."""
    return next((index + 1 for index in range(len(mask) - 1, -1, -1) if mask[index]), 0)


def last_said(probe: TokenizerProbe, ids: Sequence[int], mask: Sequence[int]) -> int:
    """Tokens up to and with the last trained one, without the line's end that some templates train after a turn."""
    last = last_trained(mask)
    while last and mask[last - 1] and ids[last - 1] in probe.after_stop:
        last -= 1
    return last


def loses_eos(probe: TokenizerProbe, row: Tokenised, max_length: int) -> bool:
    """Whether the cut removes the token that ends a side's last answer."""
    return any(last_said(probe, ids, mask) > max_length for ids, mask in row.whole.sides)


def shown(tokenizer: PreTrainedTokenizerBase, row: Tokenised) -> Shown:
    """A row, token by token."""
    sides = [
        [(_piece(tokenizer, token), bool(trained)) for token, trained in zip(ids, mask, strict=True)]
        for ids, mask in ((ids[:_SHOWN_TOKENS], mask[:_SHOWN_TOKENS]) for ids, mask in row.whole.sides)
    ]
    return Shown(row.number, sides, sum(max(len(ids) - _SHOWN_TOKENS, 0) for ids, _ in row.whole.sides))


def _piece(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Text of a token; its name in the vocabulary where it is a part of a character."""
    text: str = tokenizer.decode([token])
    return str(tokenizer.convert_ids_to_tokens(token)) if "�" in text else text
