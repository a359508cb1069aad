"""The one way by which a value gets into a page or a card: jinja2 templates that escape whatever they print.

Templates lay out, Python prepares plain values. Values come from data sets, models and recipes, so nothing in them is
taken for markup: in `*.html.jinja` they become text of an element or of a quoted attribute, in `*.md.jinja` text within
a line (of a paragraph, a heading, a table's cell), with the filters `code` and `fence` for literal text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.report import text
from smoltulu.tasks.report.bars import histogram
from smoltulu.tasks.report.charts import MAX_POINTS, line_chart, lineage_drawing

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.runtime import Context

_DRAWINGS: tuple[Callable[..., str], ...] = (line_chart, lineage_drawing, histogram)
_FORMATS = (text.number, text.percent, text.duration, text.size, text.moment)


def render(template: str, **values: Any) -> str:
    """A file of `templates/` with these values. A name that the template uses and does not get is an error."""
    return _environment().get_template(template).render(**values)


def anchor(node: str) -> str:
    """Id of a stage's details."""
    return f"stage-{text.artifact_key(node)}"


def readable_json(value: Any) -> str:
    """Indented JSON; what has no JSON form is shown as Python writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=repr)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, pass_context
    from markupsafe import Markup

    @pass_context
    def shown(context: Context, value: object) -> object:
        if hasattr(value, "__html__"):
            return value  # what a macro, a drawing or `code` and `fence` laid out
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
    return environment


def _marked(make: Callable[..., str], mark: Callable[[str], str]) -> Callable[..., str]:
    """`make`, whose result needs no escaping: it does its own."""
    return lambda *arguments: mark(make(*arguments))
