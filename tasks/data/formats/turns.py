"""Turns as chat data writes them -> messages of one kind.

A message is {"role", "content"} and, only where the row has them, "reasoning_content", "tool_calls", "name",
"tool_call_id" and "train": False for a turn that is not to be trained. Roles: system, developer, user, assistant, tool.
"""

from __future__ import annotations

from typing import Any

from smoltulu.tasks.data.formats.columns import Row
from smoltulu.tasks.data.formats.tools import call_of, calls_of
from smoltulu.tasks.data.formats.values import (
    EmptyAnswer,
    MalformedRow,
    Message,
    clean,
    is_empty,
    kind_of,
    parsed_json,
    text_of,
)

#: What turns are called in chat data, in small letters -> our role.
ROLES: dict[str, str] = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
_PLAIN_ROLES = {said: role for said, role in ROLES.items() if role in ("system", "user", "assistant")}
#: Keys of a turn that say who speaks, and what; OpenAI, ShareGPT, Gemini.
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "parts")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def as_turns(value: Any, name: str, role: str) -> list[Any]:
    """Text becomes one turn of `role`; a list is taken as turns, and so is one turn alone."""
    if isinstance(value, str):
        return [{"role": role, "content": text_of(value, name)}]
    if isinstance(value, dict) and any(key in value for key in ROLE_KEYS):
        return [value]
    if not isinstance(value, list):
        raise MalformedRow(f"field {name!r} is {kind_of(value)}, neither text nor a list of messages")
    return list(value)


def unpacked(value: Any) -> Any:
    """Turns that stand in a text as JSON, as CSV has them; any other value as it is, JSON that is an answer too."""
    if not isinstance(value, str) or not value.startswith("[") or '"' not in value:
        return value
    try:
        turns = parsed_json(value, "turns")
    except MalformedRow:
        return value
    is_chat = isinstance(turns, list) and all(
        isinstance(turn, dict) and any(key in turn for key in ROLE_KEYS) and any(key in turn for key in CONTENT_KEYS)
        for turn in turns
    )
    return turns if is_chat and turns else value


def first_role(value: Any) -> str | None:
    """Our role of the first turn of a list of turns; None where it is no such list."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    said = next((value[0][key] for key in ROLE_KEYS if isinstance(value[0].get(key), str)), "")
    return ROLES.get(said.lower())


def is_conversation(value: Any) -> bool:
    """A list that starts before the assistant speaks, so with its own prompt."""
    return first_role(value) in ("system", "developer", "user")


def conversation(turns: Any, name: str, last: str, row: Row) -> list[Message]:
    """Checked messages: system and developer at most once and first, then user and assistant in turn, with the
    results of tools behind an assistant's turn. `last`: whose turn ends it; a tool's counts as the user's.

    An empty system turn is dropped, because chat data writes "no system prompt" that way; another empty turn is a
    fault.
    """
    messages = read_turns(turns, name, row)
    check_order(messages, name, last)
    return messages


def read_turns(turns: Any, name: str, row: Row) -> list[Message]:
    """Messages of a list of turns, in whatever order they are."""
    if not isinstance(turns, list):
        raise MalformedRow(f"field {name!r} is {kind_of(turns)}, not a list of messages")
    if not turns:
        raise MalformedRow(f"no turns in {name}")
    messages: list[Message] = []
    for turn in turns:
        # Nearly all turns are two keys with plain text; the same comes of `_read_turn`, a test says.
        if turn.__class__ is dict and len(turn) == 2 and not row.source.ignore:
            said, content = turn.get("role"), turn.get("content")
            if said is None:
                said, content = turn.get("from"), turn.get("value")
            role = _PLAIN_ROLES.get(said) if said.__class__ is str else None
            if role is not None and content.__class__ is str and content and not content.isspace():
                messages.append({"role": role, "content": clean(content, name)})
                continue
        try:
            message = _read_turn(turn, name, row)
        except EmptyAnswer as error:
            if turn is turns[-1] and name != "prompt":
                raise
            raise MalformedRow(str(error)) from None  # of a prompt, or of an earlier answer
        if message is not None:
            messages.append(message)
    return messages


def _read_turn(turn: Any, name: str, row: Row) -> Message | None:
    """One message; None for an empty system turn."""
    if not isinstance(turn, dict):
        raise MalformedRow(f"a turn of {name} is not an object with role and content")
    left = {key: value for key, value in row.wanted(turn).items() if value is not None}
    said = _only(left, ROLE_KEYS, name)
    if said is None:
        raise MalformedRow(f"a turn of {name} is not an object with role and content")
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise MalformedRow(f"unknown role in {name} (known: {', '.join(ROLES)})")
    has_content = any(key in turn for key in CONTENT_KEYS)
    content, thoughts = _content(_only(left, CONTENT_KEYS, name), name, row)
    calls = calls_of(left, name, row)
    if role == "call":
        calls, content, role = call_of(content, name), "", "assistant"
    reasoning = _reasoning(left, thoughts, name)
    trained = _trained(left, role, name, row)
    named, answers = (_label(left.pop(key, None), key, name) for key in ("name", "tool_call_id"))
    row.finish_turn(left, f"{name}[]")
    if content is None and not calls:
        if not has_content:
            raise MalformedRow(f"a turn of {name} is not an object with role and content")
        raise MalformedRow(f"content of a turn of {name} is not text")
    if is_empty(content) and not calls:
        if role in ("system", "developer") and reasoning is None:
            return None
        raise (EmptyAnswer if role == "assistant" else MalformedRow)(f"empty {role} turn in {name}")
    message: Message = {"role": role, "content": clean("" if content is None else content, name)}
    if role != "assistant" and (reasoning is not None or calls):
        raise MalformedRow(f"a {role} turn of {name} has {'tool calls' if calls else 'reasoning'}")
    if role != "tool" and answers is not None:
        raise MalformedRow(f"a {role} turn of {name} has a tool_call_id")
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    if named is not None:
        message["name"] = named
    if answers is not None:
        message["tool_call_id"] = answers
    if not trained and role == "assistant":
        message["train"] = False
    return message


def _only(left: dict[str, Any], keys: tuple[str, ...], name: str) -> Any:
    """The value of the one key of several that a turn has, taken out of `left`; None where it has none."""
    given = [key for key in keys if key in left]
    if len(given) > 1:
        full = [key for key in given if not is_empty(left[key])]
        if len(full) > 1:
            raise MalformedRow(f"a turn of {name} has both {full[0]!r} and {full[1]!r}")
        given = full or given[:1]
    value = left[given[0]] if given else None
    for key in keys:
        left.pop(key, None)
    return value


def _content(value: Any, name: str, row: Row) -> tuple[str | None, list[str]]:
    """The text of a turn, and thoughts that stand among its parts. Parts of text are joined as templates join them."""
    if value is None or isinstance(value, str):
        return value, []
    if not isinstance(value, list):
        raise MalformedRow(f"content of a turn of {name} is not text")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise MalformedRow(f"a part of a turn of {name} is {kind_of(part)}")
        left = {key: inner for key, inner in row.wanted(part).items() if inner is not None}
        kind = left.pop("type", "text")
        key = "thinking" if kind == "thinking" else "reasoning" if kind == "reasoning" else "text"
        text = left.pop(key, None)
        if kind not in ("text", "input_text", "output_text", "thinking", "reasoning") or not isinstance(text, str):
            shown = kind[:40] if isinstance(kind, str) and key not in left and kind != "text" else "no text"
            raise MalformedRow(f"a part of a turn of {name} is {shown!r}: only parts of text are read")
        (thoughts if key != "text" else texts).append(text)
        row.finish_turn(left, f"{name}[].content[]")
    return "".join(texts), thoughts


def _reasoning(left: dict[str, Any], thoughts: list[str], name: str) -> str | None:
    value = _only(left, _REASONING_KEYS, name)
    if is_empty(value):
        value = "".join(thoughts)
    elif thoughts:
        raise MalformedRow(f"a turn of {name} has reasoning twice")
    if is_empty(value):
        return None
    if not isinstance(value, str):
        raise MalformedRow(f"reasoning of a turn of {name} is {kind_of(value)}, not text")
    return clean(value, name)


def _trained(left: dict[str, Any], role: str, name: str, row: Row) -> bool:
    """What `weight` (0 or 1), `train`, `trainable` and `loss` (booleans) say; MalformedRow where they disagree."""
    says = set()
    for key in ("weight", "train", "trainable", "loss"):
        value = left.pop(key, None)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and value in (0, 1) if key == "weight" else isinstance(value, bool)):
            allowed = "0 (not trained) and 1" if key == "weight" else "true and false"
            raise MalformedRow(f"{key!r} of a turn of {name} is {str(value)[:20]!r}; allowed are {allowed}")
        if value and key in ("train", "trainable") and role != "assistant":
            row.noticed.add(f"{key!r} of a {role} turn is true, and only turns of the assistant are trained")
        says.add(bool(value))
    if len(says) > 1 and role == "assistant":
        raise MalformedRow(f"a turn of {name} is to be trained and not to be trained")
    return says != {False}


def _label(value: Any, key: str, name: str) -> str | None:
    if value is None or value == "":
        return None
    return text_of(value, f"{name}[].{key}")


def check_order(messages: list[Message], name: str, last: str) -> None:
    """MalformedRow where the turns do not follow each other as a template expects."""
    roles = tuple([message["role"] for message in messages])
    if roles in _PLAIN_ORDERS[last] and all(len(message) == 2 for message in messages):
        return
    spoken = [message for message in messages if message["role"] not in ("system", "developer")]
    head = [message["role"] for message in messages[: len(messages) - len(spoken)]]
    if not spoken:
        raise MalformedRow(f"no user turn in {name}")
    if head not in ([], ["system"], ["developer"], ["system", "developer"]):
        raise MalformedRow(f"roles out of order in {name}")
    before = ""
    asked: set[str] = set()
    for message in spoken:
        role = message["role"]
        if role not in _MAY_FOLLOW[before]:
            raise MalformedRow(f"roles out of order in {name}")
        asked.update(call["id"] for call in message.get("tool_calls", ()) if "id" in call)
        if "tool_call_id" in message and asked and message["tool_call_id"] not in asked:
            raise MalformedRow(f"a tool turn of {name} answers a call that there is not")
        before = role
    if before != last and not (before == "tool" and last == "user"):
        raise MalformedRow(f"{name} does not end with the {last}'s turn")


#: The orders of most rows, which need no second look: last role -> roles of all turns.
_PLAIN_ORDERS = {
    last: {
        (*head, *("user", "assistant") * number)[: len(head) + 2 * number - (last == "user")]
        for head in ((), ("system",))
        for number in range(1, 17)
    }
    for last in ("user", "assistant")
}
_MAY_FOLLOW = {
    "": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
