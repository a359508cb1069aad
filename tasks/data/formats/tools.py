"""Calls of tools and their definitions, in OpenAI's form whichever way a row writes them."""

from __future__ import annotations

from typing import Any

from smoltulu.tasks.data.formats.columns import Row
from smoltulu.tasks.data.formats.values import MalformedRow, clean_json, is_empty, kind_of, parsed_json, text_of


def calls_of(left: dict[str, Any], name: str, row: Row) -> list[dict[str, Any]]:
    """The `tool_calls` of a turn, or its one `function_call` of older data; both are taken out of `left`."""
    several, one = left.pop("tool_calls", None), left.pop("function_call", None)
    where = f"tool_calls of a turn of {name}"
    if isinstance(several, str) and not is_empty(several):
        several = parsed_json(several, where)
    if is_empty(several):
        several = []
    if not isinstance(several, list):
        raise MalformedRow(f"{where} is {kind_of(several)}, not a list")
    if not is_empty(one):
        if several:
            raise MalformedRow(f"a turn of {name} has both 'tool_calls' and 'function_call'")
        several = [parsed_json(one, where) if isinstance(one, str) else one]
    return [_call(call, name, row, f"{name}[].tool_calls[]") for call in several]


def call_of(content: str | None, name: str) -> list[dict[str, Any]]:
    """The calls that a turn of role `function_call` holds as JSON (ShareGPT)."""
    where = f"a function_call turn of {name}"
    value = parsed_json(text_of(content, where), where)
    return [_call(call, name, None, "") for call in (value if isinstance(value, list) else [value])]


def calls_in(value: Any, name: str, row: Row) -> list[dict[str, Any]]:
    """The calls of a column: a list, or JSON of one."""
    if isinstance(value, str):
        value = parsed_json(value, f"field {name!r}")
    if not isinstance(value, list) or not value:
        raise MalformedRow(f"field {name!r} is no list of calls")
    return [_call(call, name, row, f"{name}[]") for call in value]


def _call(call: Any, name: str, row: Row | None, place: str) -> dict[str, Any]:
    """{"id"?, "type", "function": {"name", "arguments": dict}}, of that or of a bare {"name", "arguments"}.

    place: what its keys that are not read are counted under; without a row there may be none.
    """
    where = f"a tool call of {name}"
    if not isinstance(call, dict):
        raise MalformedRow(f"{where} is {kind_of(call)}, not an object")
    left = {key: value for key, value in call.items() if value is not None}
    kind, number = left.pop("type", "function"), left.pop("id", None)
    if kind != "function":
        raise MalformedRow(f"{where} is of type {str(kind)[:40]!r}; only functions are called here")
    function = left.pop("function", None)
    bare = function is None
    if bare:
        function, left = left, {}
    if not isinstance(function, dict):
        raise MalformedRow(f"{where} is no object with name and arguments")
    inner = {key: value for key, value in function.items() if value is not None}
    arguments = inner.pop("arguments", None)
    if arguments is None and "parameters" in inner:
        arguments = inner.pop("parameters")
    called = text_of(inner.pop("name", None), f"name of {where}")
    if isinstance(arguments, str) and not is_empty(arguments):
        arguments = parsed_json(arguments, f"arguments of {where}")
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise MalformedRow(f"arguments of {where} is {kind_of(arguments)}, not an object")
    for rest, part in ((left, ""), (inner, "" if bare else ".function")):
        if row is None and not is_empty(rest):
            raise MalformedRow(f"{where} has more than a name and arguments")
        if row is not None:
            row.finish_turn(rest, f"{place}{part}")
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": called, "arguments": clean_json(arguments, f"arguments of {where}")},
    }
    return made if is_empty(number) else {"id": text_of(number, f"id of {where}"), **made}


def tools_of(value: Any) -> list[dict[str, Any]]:
    """The definitions that a row gives: a list, or JSON of one; a bare function is put into {"type", "function"}."""
    if isinstance(value, str):
        value = parsed_json(value, "tools")
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise MalformedRow("tools is not a list of objects")
    made = []
    for tool in clean_json(value, "tools"):
        if tool.get("type", "function") != "function" and "function" in tool:
            raise MalformedRow(f"a tool is of type {str(tool['type'])[:40]!r}; only functions are called here")
        if "function" not in tool:
            bare = dict(tool)
            if bare.get("type") == "function":
                del bare["type"]
            tool = {"type": "function", "function": bare}
        elif "type" not in tool:
            tool = {"type": "function", **tool}
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise MalformedRow("a tool has no function with a name")
        made.append(tool)
    return made
