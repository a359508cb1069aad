"""Forms that give conversations to train on."""

from __future__ import annotations

from typing import Any

from smoltulu.tasks.data.formats.columns import Row
from smoltulu.tasks.data.formats.tools import calls_in, tools_of
from smoltulu.tasks.data.formats.transcripts import is_in_template, refuse_transcript, turns_of_transcript
from smoltulu.tasks.data.formats.turns import as_turns, check_order, read_turns, unpacked
from smoltulu.tasks.data.formats.values import MalformedRow, Message, is_empty, kind_of, parsed_json, text_of


def read_messages(row: Row) -> dict[str, Any]:
    """`messages`: turns with role and content, or from and value."""
    turns = listed(row.need("messages"), "messages")
    return _trained(read_turns(turns, "messages", row), row)


def read_prompt_completion(row: Row) -> dict[str, Any]:
    """`prompt` and `completion`, each a text or turns.

    Where both are one column, as an audit reads prompts without answers, nothing is trained, so nothing is refused.
    """
    prompt, completion = unpacked(row.need("prompt")), unpacked(row.need("completion"))
    asked_only = row.column("prompt") == row.column("completion")
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not asked_only:
            refuse_transcript(value, name)
    turns = read_turns(as_turns(prompt, "prompt", "user"), "prompt", row)
    answer = read_turns(as_turns(completion, "completion", "assistant"), "completion", row)
    if isinstance(prompt, str):
        turns = earlier_turns(row) + turns
        if is_in_template(prompt):
            row.noticed.add("a prompt is written in a template (### Instruction: …), whose marks become its text")
    if isinstance(completion, str):
        answer = [_with_reasoning(answer[0], row)]
    if asked_only:
        row.finish(refuses=False)
        check_order(turns + answer, "messages", last="assistant")
        return {"messages": turns + answer}
    return _trained(turns + answer, row, one_text=isinstance(prompt, str))


def read_instruction(row: Row) -> dict[str, Any]:
    """`instruction`, an optional `input` behind a blank line, and `output`."""
    instruction = row.text("instruction")
    # The input is optional in this form: absent, null and empty mean the same.
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise MalformedRow(f"field 'input' is {kind_of(given)}, not text")
    refuse_transcript(instruction, "instruction")
    if not is_empty(given):
        instruction = f"{instruction}\n\n{text_of(given, 'input')}"
    return _one_turn(instruction, row.text("output"), row)


def read_question_answer(row: Row) -> dict[str, Any]:
    """`question` and `answer`."""
    question = row.text("question")
    refuse_transcript(question, "question")
    return _one_turn(question, row.text("answer"), row)


def read_function_calls(row: Row) -> dict[str, Any]:
    """`query` and `answers`, the calls that answer it, as a list or JSON of one (xLAM); `tools` beside them."""
    query, calls = row.text("query"), calls_in(row.need("answers"), "answers", row)
    refuse_transcript(query, "query")
    turns: list[Message] = [
        {"role": "user", "content": query},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    return _trained(earlier_turns(row) + turns, row, one_text=True)


def read_transcript(row: Row) -> dict[str, Any]:
    """`text`: a whole conversation in one string."""
    return _trained(turns_of_transcript(row.text("text"), "text"), row)


def listed(value: Any, name: str) -> Any:
    """A list of turns that stands in a text as JSON, as CSV has it; any other value as it is."""
    if not isinstance(value, str):
        return value
    if value.startswith(("[{", "[ {", "[\n")):
        return parsed_json(value, f"field {name!r}")
    refuse_transcript(value, name)
    return value


def earlier_turns(row: Row) -> list[Message]:
    """The turns of `history`: pairs of what was asked and answered (Alpaca), or turns."""
    history = row.optional("history")
    if history is None:
        return []
    if not isinstance(history, list):
        raise MalformedRow(f"field 'history' is {kind_of(history)}, not a list of pairs or turns")
    if all(isinstance(turn, dict) for turn in history):
        return read_turns(history, "history", row)
    turns = []
    for pair in history:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise MalformedRow("an entry of 'history' is no pair of a question and an answer")
        turns.append({"role": "user", "content": text_of(pair[0], "history")})
        turns.append({"role": "assistant", "content": text_of(pair[1], "history")})
    return turns


def with_system(messages: list[Message], row: Row) -> list[Message]:
    """`messages` behind the system turn that a column of the row has; the same one twice is one."""
    system = row.optional("system")
    if system is None:
        return messages
    text = text_of(system, "system")
    if any(message["role"] in ("system", "developer") for message in messages):
        if messages[0] == {"role": "system", "content": text}:
            return messages
        raise MalformedRow("a column and a turn say another system prompt")
    return [{"role": "system", "content": text}, *messages]


def with_tools(made: dict[str, Any], row: Row) -> dict[str, Any]:
    """`made` with the tools of the row, where it has any."""
    tools = row.optional("tools")
    return made if tools is None else {**made, "tools": tools_of(tools)}


def _one_turn(user: str, assistant: str, row: Row) -> dict[str, Any]:
    refuse_transcript(assistant, "answer")
    answer = _with_reasoning({"role": "assistant", "content": assistant}, row)
    return _trained([*earlier_turns(row), {"role": "user", "content": user}, answer], row, one_text=True)


def _with_reasoning(answer: Message, row: Row) -> Message:
    reasoning = row.optional("reasoning_content")
    return answer if reasoning is None else {**answer, "reasoning_content": text_of(reasoning, "reasoning_content")}


def _trained(messages: list[Message], row: Row, one_text: bool = False) -> dict[str, Any]:
    messages = with_system(messages, row)
    check_order(messages, "messages", last="assistant")
    if not any(message["role"] == "assistant" and message.get("train", True) for message in messages):
        raise MalformedRow("no turn of messages is to be trained")
    made = with_tools({"messages": messages}, row)
    row.finish(one_text=one_text)
    return made


def read_text(row: Row) -> dict[str, Any]:
    """`text`, of benchmarks."""
    made = {"text": row.text("text")}
    row.finish(refuses=False)
    return made
