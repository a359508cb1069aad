"""Rows as the recipe's template renders them: tokens, which of them are trained, parts, and why a row has no score.

Tokens are those of the preflight, by the same functions. A row of kind `preference` is its prompt with the chosen
answer; one of `rlvr` is its prompt, of which nothing is trained.

Parts of a row are its trained turns, or the steps of these. A step ends with a blank line; in a turn without a blank
line it is a line. AIR (arXiv 2512.13279) scores reasoning step by step. How it cuts the steps we could not read, so
this rule is ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from smoltulu.schemas.data import DatasetKind
from smoltulu.schemas.preflight import PreflightConfig
from smoltulu.schemas.training import TrainedTurns
from smoltulu.tasks.data.rows import TOOLS, Message, tools_text, turn_text
from smoltulu.tasks.models.chat_template import PROBE
from smoltulu.tasks.models.tokens import PROBES, Conversation, Pair, conversations, prompt_ids, rendering_errors
from smoltulu.tasks.models.turns import NotRendered, spans_by_turn
from smoltulu.tasks.preflight.rows import tokenised
from smoltulu.tasks.selection.scores_file import (
    EMPTY_ANSWER,
    NO_TRAINED_TOKEN,
    NOT_RENDERED,
    TOO_LONG,
    row_digest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

By = Literal["row", "turn", "step"]
_NGRAM = 3
_BLANK_LINE, _LINE_END = re.compile(r"\n[^\S\n]*\n\s*"), re.compile(r"\n\s*")


@dataclass(frozen=True)
class TokenPart:
    """Tokens [first, last) of a row: a trained turn (by its number in the conversation), or a step of it."""

    turn: int
    step: int
    first: int
    last: int


@dataclass(frozen=True)
class Rendered:
    """A row as tokens. `mask`: 1 where a token is trained. `problem`: why it cannot be scored, or ""."""

    row: int
    id: str
    digest: str
    ids: list[int]
    mask: list[int]
    num_characters: int
    repetition: float
    problem: str = ""
    parts: tuple[TokenPart, ...] = ()

    def scored(self, whole: bool) -> list[int]:
        """Places of the tokens whose loss is scored: the trained ones, or all. The first has no prediction."""
        return [place for place in range(1, len(self.ids)) if whole or self.mask[place]]


@dataclass(frozen=True)
class Renderer:
    """Renders rows of one kind. `max_length`: tokens of the longest row that is scored."""

    tokenizer: PreTrainedTokenizerBase
    kind: DatasetKind
    max_length: int
    by: By = "row"
    trained_turns: TrainedTurns = "last"

    def __call__(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> list[Rendered]:
        """Rows with their numbers, in order."""
        batch = [(number, dict(row)) for number, row in rows]
        refused: set[int] = set()
        config = PreflightConfig(
            kind=_PREFLIGHT_KINDS[self.kind],
            max_length=self.max_length,
            overlong="drop",
            trained_turns=self.trained_turns,
        )
        made = tokenised(config, self.tokenizer, batch, lambda number, row, error: refused.add(number))
        whole = {one.number: one.whole for one in made}
        assert whole.keys() | refused == {number for number, _ in batch}
        return [self._rendered(number, row, whole.get(number)) for number, row in batch]

    def _rendered(self, number: int, row: dict[str, Any], whole: Conversation | Pair | None) -> Rendered:
        ids, mask = ([], []) if whole is None else whole.sides[0]  # of a pair: the chosen side
        text = scored_text(row, self.kind)
        problem = self._problem(row, mask) if whole is not None else NOT_RENDERED
        parts: tuple[TokenPart, ...] = ()
        if self.by != "row" and not problem and self.kind != "rlvr":
            try:
                parts = parts_of(self.tokenizer, turns_scored(row, self.kind), row.get(TOOLS), ids, mask, self.by)
            except NotRendered:
                problem = NOT_RENDERED
        return Rendered(
            row=number,
            id=row["id"],
            digest=row_digest(row),
            ids=ids,
            mask=mask,
            num_characters=len(text),
            repetition=repetition(text),
            problem=problem,
            parts=parts,
        )

    def _problem(self, row: Mapping[str, Any], mask: Sequence[int]) -> str:
        if len(mask) > self.max_length:
            return TOO_LONG
        if self.kind == "rlvr":
            return "" if len(mask) > 1 else NO_TRAINED_TOKEN
        answers = row["messages"] if self.kind == "sft" else row["chosen"]
        answers = [turn for turn in answers if turn["role"] == "assistant" and turn.get("train", True)]
        if answers and not any(turn_text(turn).strip() for turn in answers):
            return EMPTY_ANSWER
        return "" if any(mask[1:]) else NO_TRAINED_TOKEN


_PREFLIGHT_KINDS: dict[DatasetKind, Literal["conversations", "pairs", "prompts"]] = {
    "sft": "conversations",
    "preference": "pairs",
    "rlvr": "prompts",
}


def check_template(tokenizer: PreTrainedTokenizerBase, kind: DatasetKind) -> None:
    """ValueError where the chat template renders nothing, or marks nothing to train on, with this tokenizer."""
    refused: Exception | None = None
    for probe in (PROBE, PROBE[1:], *PROBES):  # some templates take no system turn
        try:
            if kind == "rlvr":
                if any(prompt_ids(tokenizer, [probe])):
                    return
            elif any(any(row.mask[1:]) for row in conversations(tokenizer, [probe])):
                return
        except rendering_errors() as error:
            refused = error
    why = f"it refuses: {refused}" if refused else "it marks no token of an answer ({% generation %}) as trained"
    raise ValueError(
        f"the chat template cannot render rows for the selector model: {why}; name a template that this model's "
        "tokenizer can use, or another selection.model"
    )


def turns_scored(row: Mapping[str, Any], kind: DatasetKind) -> list[Message]:
    """The messages of a row that are rendered."""
    if kind == "preference":
        return [*row["prompt"], *row["chosen"]]
    turns: list[Message] = row["messages" if kind == "sft" else "prompt"]
    return turns


def scored_text(row: Mapping[str, Any], kind: DatasetKind) -> str:
    """All text of what is rendered, a line each."""
    texts = [turn_text(turn) for turn in turns_scored(row, kind)]
    return "\n".join([*texts, tools_text(row[TOOLS])] if TOOLS in row else texts)


def repetition(text: str) -> float:
    """Share of the word 3-grams that stand there already: seq-rep-3 of Welleck et al. (arXiv 1908.04319, section 4)."""
    words = text.split()
    grams = list(zip(*(words[start:] for start in range(_NGRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def parts_of(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    ids: Sequence[int],
    mask: Sequence[int],
    by: By,
) -> tuple[TokenPart, ...]:
    """The trained turns of a row, or their steps, in order. `ids`, `mask`: the row as tokens.

    A token across two steps belongs to the later one, what closes a turn to its last step.

    Raises:
        NotRendered: the template does not let its turns be told apart.
    """
    text, spans = spans_by_turn(tokenizer, messages, tools)
    encoding = tokenizer(text, add_special_tokens=False, verbose=False)
    assert encoding["input_ids"] == list(ids), "the row is rendered otherwise than it was tokenised"
    turns: dict[int, list[tuple[int, int]]] = {}
    for turn, span in spans:
        turns.setdefault(turn, []).append(span)
    found = []
    for turn, blocks in turns.items():
        start, end = blocks[0][0], blocks[-1][1]
        starts = [start]
        if by == "step":
            starts += [start + at for at in step_starts(text[start:end], tokenizer.all_special_tokens)]
        firsts = [encoding.char_to_token(0, at) for at in starts]
        edges = [first for first in firsts if first is not None]
        last = encoding.char_to_token(0, end - 1)
        assert edges and last is not None, (turn, start, end)
        edges = [*sorted(set(edges)), last + 1]
        pieces = [(first, after) for first, after in pairwise(edges) if any(mask[max(first, 1) : after])]
        found += [TokenPart(turn, step, first, after) for step, (first, after) in enumerate(pieces)]
    return tuple(found)


def step_starts(text: str, closing: Sequence[str] = ()) -> list[int]:
    """Where the second and later steps of a turn begin, in characters.

    After a blank line; in a text without one, after the end of a line. `closing`: texts that are no step by themselves.
    """
    pattern = _BLANK_LINE if _BLANK_LINE.search(text.strip()) else _LINE_END
    ends = (match.end() for match in pattern.finditer(text) if text[: match.start()].strip())
    return [end for end in ends if text[end:].strip() and text[end:].strip() not in closing]


def tokenizer_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """In what two tokenizers differ that may give a text other tokens; None: in nothing.

    Compared is the whole way from a text to its ids: added tokens, normaliser, pre-tokeniser, and the model with its
    vocabulary and merges, as the tokenizers library writes them down. Ids are a function of these and the text alone
    (no special tokens are added to rendered rows), so equal ones give any text the same ids: no sample of texts could
    show that. Truncation, padding, decoder and post-processor do not take part.
    """
    for tokenizer in (one, other):
        if not hasattr(tokenizer, "backend_tokenizer"):
            return f"{type(tokenizer).__name__} is no tokenizer of the tokenizers library, which could be compared"
    ours, theirs = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (one, other))
    for name in ("normalizer", "pre_tokenizer"):
        if ours[name] != theirs[name]:
            return name.replace("_", "-")
    models = ours["model"], theirs["model"]
    for name in sorted(models[0].keys() | models[1].keys()):
        first, second = (model.get(name) for model in models)
        if first != second:
            if name == "vocab" and isinstance(first, dict) and isinstance(second, dict):
                odd = sorted(token for token in first.keys() | second.keys() if first.get(token) != second.get(token))
                return f"vocabulary of {len(first):,} and {len(second):,} tokens, e.g. {', '.join(map(repr, odd[:3]))}"
            return f"{name} of the model"
    added = [{token["id"]: _matching(token) for token in side["added_tokens"]} for side in (ours, theirs)]
    if added[0] != added[1]:
        ids = [token for token in added[0].keys() | added[1].keys() if added[0].get(token) != added[1].get(token)]
        names = {str((added[0].get(token) or added[1][token])["content"]) for token in ids}
        return f"added tokens, e.g. {', '.join(map(repr, sorted(names)[:3]))}"
    return None


def _matching(token: Mapping[str, Any]) -> dict[str, Any]:
    """What of an added token decides where it is found in a text."""
    return {name: value for name, value in token.items() if name not in ("id", "special")}
