"""Protects log lines from `prefect deployment run --watch`.

Prefect 3.8.8 prints every log line as Rich markup (cli/flow_runs_watching.py). "[sft] step 1" loses its "[sft]". A line
with "[/tmp/x]" ends the watching with a MarkupError and exit code 1, while the run goes on.
"""

from __future__ import annotations

import logging
import re

#: Rich reads a bracket before one of these characters as a tag (rich/markup.py).
_TAG = re.compile(r"\[(?=[a-z#/@])")
_ZERO_WIDTH_SPACE = "\u200b"


def shield(text: str) -> str:
    """`text` with an invisible character after each bracket that Rich would read as markup."""
    return _TAG.sub("[" + _ZERO_WIDTH_SPACE, text)


class _Shielding(logging.Formatter):
    """Shields the text of another formatter, traceback included."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self.inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return shield(self.inner.format(record))


def shield_run_logs() -> None:
    """Shield all logs that this process sends to Prefect's API from now on. A flow calls it at its start."""
    from prefect.logging.handlers import APILogHandler

    for name in ("prefect.flow_runs", "prefect.task_runs"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, APILogHandler) and not isinstance(handler.formatter, _Shielding):
                handler.setFormatter(_Shielding(handler.formatter))
