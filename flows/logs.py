"""Log lines as text: no terminal obeys them, `prefect deployment run --watch` survives them, tracebacks are left out.

Messages hold texts of rows, files and servers, which may hold control characters. Prefect 3.8.8 prints every log line
as Rich markup (cli/flow_runs_watching.py). "[sft] step 1" loses its "[sft]". A line with "[/tmp/x]" ends the watching
with a MarkupError and exit code 1, while the run goes on.

Prefect logs the exception that ends a run with its traceback, twice, and once more as a state. What the user has to fix
is said once, by its message. The whole traceback stays in the worker's log.
"""

from __future__ import annotations

import linecache
import logging
import re
from typing import TextIO

from smoltulu.artifacts.readable import log_text
from smoltulu.tasks.engine.launch import StageFailed


class RunFailed(RuntimeError):
    """A run that failed by what its text says: the failures of its stages, or scores that dropped."""


#: The message of these says all that a user needs; an unexpected exception keeps its traceback.
_SAID = (ValueError, OSError, StageFailed, RunFailed)
_BEFORE = re.compile(r"^(Encountered exception during execution|Task run failed with exception): ")
_STATE = re.compile(r"^(Finished in state Failed)\(.* encountered an exception.*", re.DOTALL)
#: Rich reads a bracket before one of these characters as a tag (rich/markup.py).
_TAG = re.compile(r"\[(?=[a-z#/@])")
_ZERO_WIDTH_SPACE = "\u200b"


def shield(text: str) -> str:
    """`text` with an invisible character after each bracket that Rich would read as markup."""
    return _TAG.sub("[" + _ZERO_WIDTH_SPACE, text)


class PlainFormatter(logging.Formatter):
    """The text of another formatter, traceback included, without control characters.

    shielded  for Prefect's API: also against Rich, and without the traceback of an exception of `_SAID`
    """

    def __init__(self, inner: logging.Formatter | None = None, shielded: bool = False) -> None:
        super().__init__()
        self.inner = inner or logging.Formatter("%(message)s")
        self.shielded = shielded

    def format(self, record: logging.LogRecord) -> str:
        text = log_text(self.inner.format(_without_traceback(record) if self.shielded else record))
        return shield(text) if self.shielded else text


def plain_handler(stream: TextIO) -> logging.Handler:
    """Messages alone, as plain text."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PlainFormatter())
    return handler


def _without_traceback(record: logging.LogRecord) -> logging.LogRecord:
    """A record whose exception is one of `_SAID` as its message; the state that follows it as its name."""
    text, error = record.getMessage(), _said(record)
    if error is not None:
        # The repr would show a message of several lines as one.
        text = _BEFORE.sub("", text.replace(repr(error), str(error)))
    text = _STATE.sub(r"\1", text)
    if text == record.getMessage() and error is None:
        return record
    return logging.makeLogRecord({**vars(record), "msg": text, "args": (), "exc_info": None, "exc_text": None})


def _once(record: logging.LogRecord) -> bool:
    """Filter that lets an exception of `_SAID` through once: the task, the flow and the engine each log it."""
    error = _said(record)
    if error is None:
        return True
    is_new = not hasattr(error, "_logged")
    error._logged = True  # type: ignore[attr-defined]
    return is_new


def _said(record: logging.LogRecord) -> BaseException | None:
    error = record.exc_info[1] if record.exc_info else None
    return error if isinstance(error, _SAID) and _is_raised(error) else None


def _is_raised(error: BaseException) -> bool:
    """Whether somebody wrote this error's text: Python's own, such as that of a failed unpacking, is our fault."""
    if isinstance(error, OSError) or (last := error.__traceback__) is None:
        return True
    while last.tb_next is not None:
        last = last.tb_next
    line = linecache.getline(last.tb_frame.f_code.co_filename, last.tb_lineno)
    return not line or line.lstrip().startswith("raise ")


def shield_run_logs() -> None:
    """Make this process log plain text, shielded if it goes to Prefect's API. A flow calls it at its start."""
    from prefect.logging.handlers import APILogHandler

    for name in ("prefect", "prefect.flow_runs", "prefect.task_runs"):
        for handler in logging.getLogger(name).handlers:
            if not isinstance(handler.formatter, PlainFormatter):
                shielded = isinstance(handler, APILogHandler)
                handler.setFormatter(PlainFormatter(handler.formatter, shielded))
                if shielded:
                    handler.addFilter(_once)
