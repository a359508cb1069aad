"""Whole conversations in one string: three dialects are split, the others are refused by name.

A transcript that is taken for a prompt trains a model on "Human:" and "Assistant:" as text. One is split only where the
dialect says exactly where a turn begins and ends.

    hh-rlhf     \\n\\nHuman: q\\n\\nAssistant: a          Anthropic/hh-rlhf, Dahoas/full-hh-rlhf
    guanaco     ### Human: q### Assistant: a          timdettmers/openassistant-guanaco
    ChatML      <|im_start|>user\\nq<|im_end|>\\n…
"""

from __future__ import annotations

import re
from typing import Any

from smoltulu.tasks.data.formats.values import MalformedRow, Message

_HH = re.compile(r"\n\n(Human|Assistant): ?")
_GUANACO = re.compile(r"### (Human|Assistant): ?")
_CHATML = re.compile(r"<\|im_start\|>([a-z]+)\n(.*?)(?:<\|im_end\|>\n?|\Z)", re.DOTALL)
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}

#: Dialects that do not say exactly where a turn ends, or that hold more than turns: name -> what they begin with, and
#: what must follow somewhere, so that a text which only speaks of it is none.
_REFUSED: tuple[tuple[str, re.Pattern[str], tuple[str, ...]], ...] = (
    ("Glaive (USER: … ASSISTANT: …)", re.compile(r"\s*(?:SYSTEM|USER): "), ("ASSISTANT:",)),
    ("Vicuna (USER: … ASSISTANT: …)", re.compile(r".{0,500}?\bUSER: ", re.DOTALL), ("ASSISTANT:",)),
    (
        "a chat template's <|user|> … <|assistant|>",
        re.compile(r"\s*(?:<s>)?<\|(?:system|user|prompter)\|>", re.IGNORECASE),
        ("<|assistant|>", "<|Assistant|>", "<|ASSISTANT|>"),
    ),
    ("DeepSeek's <｜User｜>", re.compile(r".{0,2000}?<｜User｜>", re.DOTALL), ("<｜Assistant｜>",)),
    ("Llama 2's [INST] … [/INST]", re.compile(r"\s*(?:<s>)?\s*\[INST\]"), ("[/INST]",)),
    (
        "Llama 3's <|start_header_id|>",
        re.compile(r"\s*(?:<\|begin_of_text\|>)?<\|start_header_id\|>"),
        ("<|end_header_id|>",),
    ),
    ("Gemma's <start_of_turn>", re.compile(r"\s*(?:<bos>)?<start_of_turn>"), ("<start_of_turn>",)),
    ("HelpSteer's <extra_id_1>", re.compile(r".*?<extra_id_1>(?:User|Assistant)", re.DOTALL), ("<extra_id_1>",)),
    ("OIG's <human>: … <bot>: …", re.compile(r"\s*<human>:"), ("<bot>:",)),
    ("Baize's [|Human|] … [|AI|] …", re.compile(r".{0,500}?\[\|Human\|\]", re.DOTALL), ("[|AI|]",)),
    ("### User: … ### Assistant: …", re.compile(r"\s*### ?(?:System|User|Human)\b"), ("### Assistant", "###Assistant")),
    # With nothing behind the last mark it is one prompt in a template (mosaicml/dolly_hhrlhf), and no conversation.
    (
        "Alpaca's ### Instruction: … ### Response:",
        re.compile(r".{0,500}?### Instruction:.*### Response:\s*\S", re.DOTALL),
        ("### Response:",),
    ),
    (
        "Human: … Assistant: …",
        re.compile(r"\s*(?:Human|User|System): ", re.IGNORECASE),
        ("\nAssistant:", "\nassistant:", "\nASSISTANT:", "\nAI:", "\nBot:", "\nGPT:"),
    ),
)  # fmt: skip


def dialect_of(text: Any) -> str | None:
    """The dialect of a transcript: hh-rlhf, guanaco, ChatML, or that of a refused one; None for a text that is none."""
    if not isinstance(text, str):
        return None
    if text.startswith("\n\nHuman:") and "\n\nAssistant:" in text:
        return "hh-rlhf"
    if text.startswith("### Human:") and "### Assistant:" in text:
        return "guanaco"
    if _CHATML.match(text):
        return "ChatML"
    return next(
        (name for name, start, then in _REFUSED if any(mark in text for mark in then) and start.match(text)), None
    )


def is_in_template(text: str) -> bool:
    """Whether a prompt is written in Alpaca's template, whose marks become text of the turn."""
    return "### Instruction:" in text and text.rstrip().endswith("### Response:")


def is_transcript(text: Any) -> bool:
    """Whether `turns_of_transcript` splits the text."""
    return dialect_of(text) in _SPLIT


def turns_of_transcript(text: str, name: str) -> list[Message]:
    """The turns of a transcript, their text as it stands between the marks. A cue for the assistant at the end
    ("\\n\\nAssistant:" with nothing behind it) is left out: it is the place of the answer.

    Raises:
        MalformedRow: a dialect that is not split, or text that is none.
    """
    dialect = dialect_of(text)
    if dialect is None:
        raise MalformedRow(f"field {name!r} is no transcript; read are {', '.join(_SPLIT)}")
    if dialect not in _SPLIT:
        refuse_transcript(text, name)
    turns = _SPLIT[dialect](text, name)
    if len(turns) > 1 and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns


def refuse_transcript(text: Any, name: str) -> None:
    """MalformedRow for a text that would be one turn, and is a whole conversation."""
    if (dialect := dialect_of(text)) is not None:
        how = (
            f"format transcript reads it (fields: {{text: {name}}})"
            if dialect in _SPLIT
            else "split it into messages with role and content"
        )
        raise MalformedRow(f"field {name!r} is a transcript in one string, {dialect}, not one turn; {how}")


def _marked(pattern: re.Pattern[str], text: str) -> list[Message]:
    pieces = pattern.split(text)
    assert not pieces[0], pieces[0]
    return [
        {"role": _SPEAKERS[speaker], "content": content}
        for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def _chatml(text: str, name: str) -> list[Message]:
    turns, end = [], 0
    for match in _CHATML.finditer(text):
        if match.start() != end:
            break
        turns.append({"role": match[1], "content": match[2]})
        end = match.end()
    if end != len(text):
        raise MalformedRow(f"field {name!r} is ChatML with text between its turns")
    return turns


_SPLIT = {
    "hh-rlhf": lambda text, name: _marked(_HH, text),
    "guanaco": lambda text, name: _marked(_GUANACO, text),
    "ChatML": _chatml,
}
