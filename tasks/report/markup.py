"""Pieces of HTML. `e` is the only way by which a value gets into the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from smoltulu.tasks.report import text


def table(heads: Sequence[str | tuple[str, str]], rows: Iterable[str], wrap_body: bool = True) -> str:
    """`heads` are texts, or (text, class); `rows` are finished HTML."""
    cells = [(head, "") if isinstance(head, str) else head for head in heads]
    titles = "".join(
        f'<th scope="col"{f" class={chr(34)}{style}{chr(34)}" if style else ""}>{e(name)}</th>' for name, style in cells
    )
    head = f"<thead><tr>{titles}</tr></thead>" if cells else ""
    body = "".join(rows)
    return f'<div class="scroll"><table>{head}{f"<tbody>{body}</tbody>" if wrap_body else body}</table></div>'


def anchor(node: str) -> str:
    """Id of a stage's details."""
    return f"stage-{text.artifact_key(node)}"


def readable_json(value: Any) -> str:
    """Indented JSON; what has no JSON form is shown as Python writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=repr)


def preformatted(value: str) -> str:
    """Text as it is, escaped."""
    return f"<pre>{e(value)}</pre>"


def e(value: object) -> str:
    """`value` as text of an element or of a quoted attribute."""
    return escape(clean(value), quote=True)


def clean(value: object) -> str:
    """Text without what HTML or UTF-8 cannot hold, or what turns the reading direction: shown as U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "�", str(value))
