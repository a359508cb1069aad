"""Turns with tool calls, reasoning or other roles, and turns that are not trained on, through any chat template.

What a template does with a turn is seen from outside: every text of the conversation gets a mark of its own, and the
marked conversation is rendered beside the plain one. A text whose mark is missing was not rendered; the turn of a
{% generation %} block is the one whose marks are inside. Marks change nothing else: without them, both are the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Messages = list[Message]
Tools = list[dict[str, Any]]
#: A part of a text, [start, end) in characters.
Span = tuple[int, int]
#: Where in a text its mark stands. Templates look at how a text begins or ends, so one of these may change something.
Place = Literal["end", "front", "middle"]
PLACES: tuple[Place, ...] = ("end", "front", "middle")


class Prompt(Messages):
    """Messages that also say which tools they offer, for libraries that hand on a prompt as one value."""

    def __init__(self, messages: Messages, tools: Tools | None = None) -> None:
        super().__init__(messages)
        self.tools = tools


def tools_of(messages: Messages) -> Tools | None:
    """The tools of a `Prompt`; other messages offer none."""
    return getattr(messages, "tools", None)


_PLAIN_ROLES = ("system", "user", "assistant")
_OF_TOOLS = -1  # in place of a turn's number
_AS_LETTERS = str.maketrans("0123456789", "ghijklmnop")


class NotRendered(ValueError):
    """A conversation that the chat template cannot say. The text is the same for all rows with the fault."""


@dataclass(frozen=True)
class _Part:
    """A marked text. `turn`: number of its message; `what`: name of the field, for people."""

    turn: int
    what: str


@dataclass
class _Marked:
    """A conversation with a mark in each text, and what else must be seen: texts too short or not fit for a mark."""

    place: Place
    begin: str
    messages: Messages = field(default_factory=list)
    tools: Tools | None = None
    parts: list[_Part] = field(default_factory=list)
    literals: list[tuple[str, Any]] = field(default_factory=list)

    def mark(self, text: str, turn: int, what: str) -> str:
        inner = text.strip()
        if not inner:
            return text
        start = text.index(inner)
        at = start + {"end": len(inner), "front": 0, "middle": len(inner) // 2}[self.place]
        self.parts.append(_Part(turn, what))
        return f"{text[:at]}{self.begin}{len(self.parts) - 1}z{text[at:]}"

    def mark_values(self, value: Any, turn: int, what: str) -> Any:
        """The texts of JSON, each marked. Numbers, true, false and null are noted."""
        if isinstance(value, dict):
            self.literals += [(what, name) for name in value]
            return {name: self.mark_values(inner, turn, what) for name, inner in value.items()}
        if isinstance(value, list):
            return [self.mark_values(inner, turn, what) for inner in value]
        if isinstance(value, str):
            return self.mark(value, turn, what)
        self.literals.append((what, value))
        return value

    def mark_descriptions(self, value: Any) -> Any:
        """A tool, its names and descriptions marked. Types and the like a template may spell otherwise."""
        if isinstance(value, list):
            return [self.mark_descriptions(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        if isinstance(value.get("properties"), dict):
            self.literals += [("tools", name) for name in value["properties"]]
        is_function = "parameters" in value or isinstance(value.get("name"), str)
        return {
            name: self.mark(inner, _OF_TOOLS, "tools")
            if isinstance(inner, str) and (name == "description" or (name == "name" and is_function))
            else self.mark_descriptions(inner)
            for name, inner in value.items()
        }

    def unmarked(self, text: str) -> str:
        return re.sub(f"{self.begin}[0-9]+z", "", text)

    def marks(self, text: str) -> list[tuple[int, _Part]]:
        """Where each mark stands in a text, in order."""
        found = re.finditer(f"{self.begin}([0-9]+)z", text)
        return [(match.start(), self.parts[int(match[1])]) for match in found]


def is_plain(messages: Messages, tools: Tools | None) -> bool:
    """Whether a conversation has turns of role and content only, of the roles that every template is tried on."""
    return not tools and all(len(turn) == 2 and turn["role"] in _PLAIN_ROLES for turn in messages)


def as_rendered(messages: Messages) -> Messages:
    """Messages as a chat template gets them: whether one is trained on is no part of what is said."""
    if not any("train" in turn for turn in messages):
        return messages
    return [{name: value for name, value in turn.items() if name != "train"} for turn in messages]


def trained_spans(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools | None) -> list[Span] | None:
    """The parts of a conversation's text that are trained on; None: all that the template marks.

    Raises:
        NotRendered: a text is not in what the template renders, or its turns cannot be told apart.
    """
    text, spans, marked, marked_text, marked_spans = _looked_at(tokenizer, messages, tools, False)
    marks = marked.marks(marked_text)
    _refuse_untrained_calls(messages, marks, marked_spans)
    if all(turn.get("train", True) for turn in messages):
        return None
    if len(spans) != len(marked_spans):
        raise _other_text()
    return [
        span
        for span, marked_span in zip(spans, marked_spans, strict=True)
        if _is_trained(messages, marks, marked_span) and text[slice(*span)]
    ]


def spans_by_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools | None
) -> tuple[str, list[tuple[int, Span]]]:
    """A conversation's text, and for each {% generation %} block its turn and its part of the text, in their order.

    A block that several turns share counts as the first one's.

    Raises:
        NotRendered: as `trained_spans`.
    """
    text, spans, marked, marked_text, marked_spans = _looked_at(tokenizer, messages, tools, False)
    if len(spans) != len(marked_spans):
        raise _other_text()
    marks = marked.marks(marked_text)
    turns = [_turns_of(messages, marks, span) or _unmarked_between(messages, marks, span[0]) for span in marked_spans]
    return text, [(min(found), span) for found, span in zip(turns, spans, strict=True) if found and span[0] < span[1]]


def _unmarked_between(messages: Messages, marks: list[tuple[int, _Part]], at: int) -> set[int]:
    """The assistant's turns without a text, and so without a mark, between the marks before and behind a place."""
    behind = bisect_left(marks, at, key=lambda mark: mark[0])
    before = [part.turn for _, part in marks[:behind] if part.turn != _OF_TOOLS]
    after = [part.turn for _, part in marks[behind:] if part.turn != _OF_TOOLS]
    between = range(max(before, default=-1) + 1, min(after, default=len(messages)))
    return {turn for turn in between if messages[turn]["role"] == "assistant"}


def check_rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools | None) -> None:
    """Of a prompt: raises NotRendered where a text of it is not in what the template renders."""
    _looked_at(tokenizer, messages, tools, True)


def _looked_at(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools | None, add_generation_prompt: bool
) -> tuple[str, list[Span], _Marked, str, list[Span]]:
    """Text and spans of a conversation, the marked conversation, and text and spans of that."""

    def render(messages: Messages, tools: Tools | None) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        (text,), (spans,) = render_jinja_template(
            conversations=[as_rendered(messages)],
            tools=tools or None,
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
        return text, spans

    text, spans = render(messages, tools)
    begin = _unused(json.dumps([messages, tools], ensure_ascii=False) + text)
    for place in PLACES:
        marked = _marked(messages, tools, place, begin)
        marked_text, marked_spans = render(marked.messages, marked.tools)
        if marked.unmarked(marked_text) == text:
            break
    else:
        raise _other_text()
    if not is_plain(as_rendered(messages), tools):
        _refuse_lost_parts(marked, marked_text, text)
    return text, spans, marked, marked_text, marked_spans


def _unused(text: str) -> str:
    """How a mark begins: letters that are nowhere in a text. Of its digest: no text can be made to have them."""
    for number in count():
        digest = hashlib.sha256(f"{number}{text}".encode()).hexdigest()[:8]
        begin = "q" + digest.translate(_AS_LETTERS)
        if begin not in text:
            return begin
    raise AssertionError


def _marked(messages: Messages, tools: Tools | None, place: Place, begin: str) -> _Marked:
    """Every text of a conversation with a mark."""
    made = _Marked(place, begin)
    for number, turn in enumerate(messages):
        role, copy = turn["role"], dict(turn)
        what = f"turns of role {role}" if role not in _PLAIN_ROLES else f"content of {role} turns"
        copy["content"] = made.mark(turn["content"], number, what)
        if "reasoning_content" in turn:
            copy["reasoning_content"] = made.mark(turn["reasoning_content"], number, "reasoning_content")
        if "tool_calls" in turn:
            copy["tool_calls"] = [_marked_call(made, call, number) for call in turn["tool_calls"]]
        made.messages.append(copy)
    made.tools = made.mark_descriptions(tools) if tools else None
    return made


def _marked_call(made: _Marked, call: dict[str, Any], turn: int) -> dict[str, Any]:
    function = call["function"]
    named = made.mark(function["name"], turn, "tool_calls")
    arguments = made.mark_values(function["arguments"], turn, "tool_calls")
    return {**call, "function": {**function, "name": named, "arguments": arguments}}


def _refuse_lost_parts(marked: _Marked, marked_text: str, text: str) -> None:
    seen = {id(part) for _, part in marked.marks(marked_text)}
    lost = [part.what for part in marked.parts if id(part) not in seen]
    lost += [what for what, value in marked.literals if not any(form in text for form in _forms(value))]
    if lost:
        names = ", ".join(dict.fromkeys(lost))
        raise NotRendered(
            f"the chat template leaves out text: {names}; name a template that renders it, or leave it out of the rows "
            "(ignore)"
        )
    for turn in marked.messages:
        for call in turn.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            if arguments and str(arguments) in marked_text:
                raise NotRendered(
                    "the chat template writes arguments of tool_calls as Python writes them, not as JSON: use the "
                    "filter tojson there"
                )


def _forms(value: Any) -> tuple[str, ...]:
    """How a name, number, true, false or null may be written."""
    return str(value), json.dumps(value, ensure_ascii=False), json.dumps(value)


def _refuse_untrained_calls(messages: Messages, marks: list[tuple[int, _Part]], spans: Sequence[Span]) -> None:
    starts = [start for start, _ in spans]
    for at, part in marks:
        is_trained = part.what == "tool_calls" and messages[part.turn].get("train", True)
        block = bisect_right(starts, at) - 1
        if is_trained and (block < 0 or at >= spans[block][1]):
            raise NotRendered(
                "the chat template writes tool_calls outside of {% generation %} … {% endgeneration %}: a model would "
                "not learn to call; put them inside, before the end of the turn"
            )


def _is_trained(messages: Messages, marks: list[tuple[int, _Part]], span: Span) -> bool:
    """Whether a {% generation %} block belongs to a turn that is trained on."""
    answers = {messages[turn].get("train", True) for turn in _turns_of(messages, marks, span)}
    if len(answers) != 1:
        raise NotRendered(
            "the chat template marks turns with train false and turns that are trained as one: put {% generation %} … "
            "{% endgeneration %} around each turn of its own"
        )
    return answers.pop()


def _turns_of(messages: Messages, marks: list[tuple[int, _Part]], span: Span) -> set[int]:
    """The turns of a {% generation %} block.

    A block without a mark, as of the end of a turn, belongs to the assistant's turn before or behind it.
    """
    first, last = (bisect_left(marks, at, key=lambda mark: mark[0]) for at in span)
    turns = {part.turn for _, part in marks[first:last] if part.turn != _OF_TOOLS}
    if first == last:
        beside = {part.turn for _, part in marks[max(first - 1, 0) : last + 1] if part.turn != _OF_TOOLS}
        turns = {turn for turn in beside if messages[turn]["role"] == "assistant"}
    return turns


def _other_text() -> NotRendered:
    return NotRendered(
        "the chat template writes a conversation otherwise where a text of it is another, so it cannot be seen which "
        "part of its text is which turn; leave out train and what is more than role and content"
    )
