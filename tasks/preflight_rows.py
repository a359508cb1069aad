"""What the preflight looks for in a row, and what became of all of them."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.preflight import PreflightConfig, TokenizerFacts
from tasks.tokens import (
    Conversation,
    Messages,
    Pair,
    conversations,
    fit_conversation,
    fit_pair,
    pairs,
    prompt_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("smoltulu")

_NUM_EXAMPLES = 3
_SHOWN_TOKENS = 600
_SHOWN_CHARACTERS = 2_000
_PROBE = [
    {"role": "system", "content": "probe system"},
    {"role": "user", "content": "probe question"},
    {"role": "assistant", "content": "probe answer"},
]


@dataclass(frozen=True)
class Tokenised:
    """A row as it is written, nothing cut. A prompt of RLVR is a conversation that nothing is trained of."""

    number: int
    source: dict[str, Any]
    whole: Conversation | Pair

    @property
    def sides(self) -> list[tuple[list[int], list[int]]]:
        """Token ids and mask of the sequences that a row is: one, or both completions after their prompt."""
        return sides_of(self.whole)

    @property
    def length(self) -> int:
        """Tokens of the longer side."""
        return self.whole.length if isinstance(self.whole, Pair) else len(self.whole.input_ids)

    @property
    def answers(self) -> list[str]:
        """What the assistant says."""
        return [turn["content"] for turn in self._turns if turn["role"] == "assistant"]

    @property
    def texts(self) -> list[str]:
        """What anybody says."""
        return [turn["content"] for turn in self._turns]

    @property
    def _turns(self) -> Messages:
        return [
            turn for name in ("messages", "prompt", "chosen", "rejected") for turn in self.source.get(name) or ()
        ]  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A row for the report: (text of a token, whether it is trained on) of each side; how many more there are."""

    number: int
    sides: list[list[tuple[str, bool]]]
    num_left_out: int


@dataclass(frozen=True)
class Look:
    """What to look for: special tokens and headers of the chat template as text, and their ids."""

    facts: TokenizerFacts
    special: tuple[str, ...]
    headers: tuple[str, ...]

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, model: Path) -> Look:
        """From a tokenizer with its template, and the config.json of the base model."""
        config = json.loads((model / "config.json").read_text())
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = tuple(sorted(added | set(tokenizer.all_special_tokens)))
        text = tokenizer.apply_chat_template(_PROBE, tokenize=False)
        bos = tokenizer.bos_token_id
        begins = tokenizer(text)["input_ids"][:2]
        facts = TokenizerFacts(
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=bos,
            adds_bos=bos is not None and begins == [bos, bos],
            num_embeddings=config.get("vocab_size"),
            max_position_embeddings=config.get("max_position_embeddings"),
        )
        return Look(facts, special, _headers(text, special))


def _headers(probe: str, special: Sequence[str]) -> tuple[str, ...]:
    """What a template writes before a turn, without special tokens: `<|user|>` for Tulu."""
    found = []
    for turn in _PROBE:
        header, _, probe = probe.partition(turn["content"])
        for token in special:
            header = header.replace(token, "")
        if header.strip():
            found.append(header.strip())
    return tuple(found)


def tokenised(
    config: PreflightConfig,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[int, dict[str, Any]]],
    counts: Counts,
) -> list[Tokenised]:
    """The rows of a batch that the template renders; the others are counted, and cost the batch nothing."""
    import jinja2

    rows = [row for _, row in batch]
    try:
        made: list[Any]
        if config.kind == "conversations":
            made = conversations(tokenizer, [row["messages"] for row in rows])
        elif config.kind == "pairs":
            made = pairs(tokenizer, rows, config.trained_turns)
        else:
            asked = prompt_ids(tokenizer, [row["prompt"] for row in rows])
            made = [Conversation(ids, [0] * len(ids), stable=True) for ids in asked]
        return [Tokenised(number, row, whole) for (number, row), whole in zip(batch, made, strict=True)]
    except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        if len(batch) > 1:
            return [row for single in batch for row in tokenised(config, tokenizer, [single], counts)]
        number, row = batch[0]
        if not counts.num_malformed:
            logger.warning("row %d is not rendered by the chat template: %s: %s", number, type(error).__name__, error)
        counts.num_source_rows += 1
        counts.note("num_malformed", number, row)
        return []


class Counts:
    """What became of the rows, as they go by. Every `num_` is a field of PreflightOutputs."""

    def __init__(self) -> None:
        self.num_source_rows = self.num_rows = self.num_dropped = self.num_empty = self.num_truncated = 0
        self.num_overlong = self.num_malformed = self.num_eos_lost = self.num_without_eos = self.num_unstable = 0
        self.num_special = self.num_special_trained = self.num_headers = 0
        self.num_two_bos = self.num_beyond_embeddings = self.num_duplicates = self.num_equal = 0
        self.num_tokens = self.num_trained_tokens = self.longest = 0
        self.lengths: list[int] = []
        #: Kind of finding -> the first few rows that show it; their text as JSON, cut.
        self.examples: dict[str, list[int]] = {}
        self.texts: dict[int, str] = {}
        self._shown: list[Tokenised] = []
        self._seen: set[bytes] = set()

    def totals(self) -> dict[str, int]:
        """All counts, by their field of PreflightOutputs."""
        return {name: value for name, value in vars(self).items() if name.startswith("num_") or name == "longest"}

    def note(self, finding: str, number: int, source: dict[str, Any]) -> None:
        """Count a finding and remember its first rows."""
        setattr(self, finding, getattr(self, finding) + 1)
        rows = self.examples.setdefault(finding, [])
        if len(rows) < _NUM_EXAMPLES:
            rows.append(number)
            text = json.dumps(source, ensure_ascii=False)
            self.texts[number] = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"

    def fit(self, config: PreflightConfig, look: Look, row: Tokenised) -> Conversation | Pair | None:
        """The row within max_length, or None where it is left out; counted either way."""
        self.num_source_rows += 1
        self.lengths.append(row.length)
        for finding in _findings(config, look, row):
            self.note(finding, row.number, row.source)
        overlong = row.length > config.max_length
        if overlong:
            self.note("num_overlong", row.number, row.source)
        fitted = _fit(config, row.whole)
        if fitted is None:
            dropped = overlong and (config.overlong == "drop" or config.kind == "prompts")
            self.note("num_dropped" if dropped else "num_empty", row.number, row.source)
            return None
        if overlong:
            self.note("num_truncated", row.number, row.source)
            if _loses_eos(row, config.max_length):
                self.note("num_eos_lost", row.number, row.source)
        self._keep(row, fitted)
        return fitted

    def _keep(self, row: Tokenised, fitted: Conversation | Pair) -> None:
        self.num_rows += 1
        sides = sides_of(fitted)
        self.num_tokens += sum(len(ids) for ids, _ in sides)
        self.num_trained_tokens += sum(sum(mask) for _, mask in sides)
        self.longest = max(self.longest, *(len(ids) for ids, _ in sides))
        # A part between the sides: the same tokens divided otherwise are another pair.
        tokens = b"|".join(array("q", ids).tobytes() for ids, _ in sides)
        digest = hashlib.blake2b(tokens, digest_size=12).digest()
        if digest in self._seen:
            self.note("num_duplicates", row.number, row.source)
        self._seen.add(digest)
        if isinstance(fitted, Pair) and fitted.chosen_ids == fitted.rejected_ids:
            self.note("num_equal", row.number, row.source)
        if len(self._shown) < _NUM_EXAMPLES:
            self._shown.append(Tokenised(row.number, {}, fitted))

    def shown(self, tokenizer: PreTrainedTokenizerBase) -> list[Shown]:
        """The first rows that are left, token by token."""
        rows = []
        for row in self._shown:
            sides = [
                [(_piece(tokenizer, token), bool(trained)) for token, trained in zip(ids, mask, strict=True)]
                for ids, mask in ((ids[:_SHOWN_TOKENS], mask[:_SHOWN_TOKENS]) for ids, mask in row.sides)
            ]
            rows.append(Shown(row.number, sides, sum(max(len(ids) - _SHOWN_TOKENS, 0) for ids, _ in row.sides)))
        return rows


def sides_of(row: Conversation | Pair) -> list[tuple[list[int], list[int]]]:
    """Token ids and mask of the sequences that a row is: one, or both completions after their prompt."""
    if isinstance(row, Conversation):
        return [(row.input_ids, row.mask)]
    return [
        (row.prompt_ids + row.chosen_ids, row.prompt_mask + row.chosen_mask),
        (row.prompt_ids + row.rejected_ids, row.prompt_mask + row.rejected_mask),
    ]


def _fit(config: PreflightConfig, whole: Conversation | Pair) -> Conversation | Pair | None:
    if config.kind == "prompts":
        assert isinstance(whole, Conversation)
        return whole if len(whole.input_ids) <= config.max_length else None
    if isinstance(whole, Pair):
        return fit_pair(whole, config.max_length, config.overlong)
    return fit_conversation(whole, config.max_length, config.overlong)


def _findings(config: PreflightConfig, look: Look, row: Tokenised) -> list[str]:
    """Findings of a row as it is written."""
    found = []
    facts = look.facts
    if not row.whole.stable:
        found.append("num_unstable")
    texts = row.texts
    if any(token in text for text in texts for token in look.special):
        found.append("num_special")
        if any(token in text for text in row.answers for token in look.special):
            found.append("num_special_trained")
    if any(header in text for text in texts for header in look.headers):
        found.append("num_headers")
    for ids, mask in row.sides:
        if facts.bos_token_id is not None and ids[:2] == [facts.bos_token_id] * 2 and "num_two_bos" not in found:
            found.append("num_two_bos")
        beyond = facts.num_embeddings is not None and max(ids, default=0) >= facts.num_embeddings
        if beyond and "num_beyond_embeddings" not in found:
            found.append("num_beyond_embeddings")
        last = last_trained(mask)
        without_eos = last > 0 and ids[last - 1] != facts.eos_token_id
        if config.kind != "prompts" and without_eos and "num_without_eos" not in found:
            found.append("num_without_eos")
    return found


def last_trained(mask: Sequence[int]) -> int:
    """Tokens up to and with the last one that is trained on."""
    return next((index + 1 for index in range(len(mask) - 1, -1, -1) if mask[index]), 0)


def _loses_eos(row: Tokenised, max_length: int) -> bool:
    """Whether a side's last trained token, its eos, lies behind the cut."""
    return any(last_trained(mask) > max_length for _, mask in row.sides)


def _piece(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Text of a token; its name in the vocabulary where it is a part of a character."""
    text: str = tokenizer.decode([token])
    return str(tokenizer.convert_ids_to_tokens(token)) if "�" in text else text
