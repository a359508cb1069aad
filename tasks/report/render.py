"""Renders pages and cards by jinja2 templates that escape every value.

Python prepares plain values, templates lay them out. Values come from data sets, models and recipes, so they are never
read as markup. In `*.html.jinja` they become text of an element or of a quoted attribute. In `*.md.jinja` they become
text within a line (of a paragraph, a heading, a table cell); the filters `code` and `fence` mark literal text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.report import text
from smoltulu.tasks.report.bars import histogram
from smoltulu.tasks.report.charts import MAX_POINTS, line_chart, lineage_drawing
from smoltulu.tasks.report.verdict import signed, task_title

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.runtime import Context

_DRAWINGS: tuple[Callable[..., str], ...] = (line_chart, lineage_drawing, histogram)
_FORMATS: tuple[Callable[..., str], ...] = (
    text.number, text.percent, text.duration, text.size, text.moment, text.visible, text.forecast_and_fact, task_title,
    signed,
)  # fmt: skip
#: Characters of a prompt or an answer that are shown without being asked for.
MAX_SHORT = 400


def render(template: str, **values: Any) -> str:
    """Render a file of `templates/` with these values. A missing value is an error."""
    return _environment().get_template(template).render(**values)


def anchor(node: str) -> str:
    """HTML id of the details of a stage."""
    return f"stage-{text.artifact_key(node)}"


def readable_json(value: Any) -> str:
    """Indented JSON; values without a JSON form are shown as in Python."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=repr)


def search_script() -> tuple[str, str]:
    """The script of a search box, and what a page's policy has to say for it to run."""
    script = (Path(__file__).parent / "templates" / "search.js.jinja").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"<script>{script}</script>", f"; script-src 'sha256-{digest}'"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, pass_context
    from markupsafe import Markup

    @pass_context
    def shown(context: Context, value: object) -> object:
        if hasattr(value, "__html__"):
            return value  # markup from a macro, a drawing, `code` or `fence`
        if (context.name or "").endswith(".md.jinja"):
            return Markup(text.markdown_text(value))
        return text.clean(value)

    environment = Environment(
        loader=PackageLoader("smoltulu.tasks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=shown,
    )
    environment.filters |= {function.__name__: function for function in (*_FORMATS, anchor, readable_json)}
    environment.filters |= {"stage_title": text.title}
    environment.filters |= {"code": _marked(text.markdown_code, Markup), "fence": _marked(text.markdown_block, Markup)}
    environment.globals |= {draw.__name__: _marked(draw, Markup) for draw in _DRAWINGS} | {"MAX_POINTS": MAX_POINTS}
    script, policy = search_script()
    environment.globals |= {"MAX_SHORT": MAX_SHORT, "search_script": Markup(script), "search_policy": Markup(policy)}
    return environment


def _marked(make: Callable[..., str], mark: Callable[[str], str]) -> Callable[..., str]:
    """`make`, with its result marked as escaped: it escapes its own values."""
    return lambda *arguments: mark(make(*arguments))
