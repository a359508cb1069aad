"""Log lines as text: no terminal obeys them, and `prefect deployment run --watch` survives them.

Messages hold texts of rows, files and servers, which may hold control characters. Prefect 3.8.8 prints every log line
as Rich markup (cli/flow_runs_watching.py). "[sft] step 1" loses its "[sft]". A line with "[/tmp/x]" ends the watching
with a MarkupError and exit code 1, while the run goes on.
"""

from __future__ import annotations

import logging
import re
from typing import TextIO

from smoltulu.artifacts.readable import log_text

#: Rich reads a bracket before one of these characters as a tag (rich/markup.py).
_TAG = re.compile(r"\[(?=[a-z#/@])")
_ZERO_WIDTH_SPACE = "\u200b"


def shield(text: str) -> str:
    """`text` with an invisible character after each bracket that Rich would read as markup."""
    return _TAG.sub("[" + _ZERO_WIDTH_SPACE, text)


class PlainFormatter(logging.Formatter):
    """The text of another formatter, traceback included, without control characters; `shielded`: also against Rich."""

    def __init__(self, inner: logging.Formatter | None = None, shielded: bool = False) -> None:
        super().__init__()
        self.inner = inner or logging.Formatter("%(message)s")
        self.shielded = shielded

    def format(self, record: logging.LogRecord) -> str:
        text = log_text(self.inner.format(record))
        return shield(text) if self.shielded else text


def plain_handler(stream: TextIO) -> logging.Handler:
    """Messages alone, as plain text."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PlainFormatter())
    return handler


def shield_run_logs() -> None:
    """Make this process log plain text, shielded if it goes to Prefect's API. A flow calls it at its start."""
    from prefect.logging.handlers import APILogHandler

    for name in ("prefect", "prefect.flow_runs", "prefect.task_runs"):
        for handler in logging.getLogger(name).handlers:
            if not isinstance(handler.formatter, PlainFormatter):
                handler.setFormatter(PlainFormatter(handler.formatter, shielded=isinstance(handler, APILogHandler)))
