"""What commands print: whatever a text says, the terminal obeys only what we print ourselves."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text
from rich.tree import Tree

from smoltulu.flows.cli import output
from smoltulu.flows.logs import PlainFormatter, plain_handler, shield_run_logs

HOSTILE = "\x1b[31mred \x1b]0;title\x07 \x1b]52;c;aGk=\x1b\\ \x9b2J \x08\x7f\r \u2028\u202eback \x00 \x85 [/] [red]"


def is_plain(text: str) -> bool:
    return all(letter in "\n\t" or letter.isprintable() for letter in text)


@pytest.mark.parametrize("bad", [HOSTILE, "a\ud800b", "\x1b" * 3])
def test_a_console_obeys_no_text(bad: str) -> None:
    stream = io.StringIO()
    out = output.console(file=stream)
    table = output.table(f"heading {bad}", "b", title=f"title {bad}")
    table.add_row(bad, Text(f"coloured {bad}", "red"))
    tree = Tree(bad)
    tree.add(Text.assemble((bad, "red"), bad))
    for thing in (bad, table, tree, Text(bad)):
        out.print(thing)
    out.print(bad, soft_wrap=True)
    assert is_plain(stream.getvalue()) and "�" in stream.getvalue()


def test_a_console_keeps_its_own_colours() -> None:
    stream = io.StringIO()
    out = output.console(file=stream, force_terminal=True, color_system="standard")
    out.print(Text("\x1b[32mgreen", "red"))
    assert "\x1b[31m" in stream.getvalue() and "\x1b[32m" not in stream.getvalue()


@given(st.text() | st.text(st.sampled_from(HOSTILE)))
def test_lines_failures_and_json_are_plain(text: str) -> None:
    for write in (output.echo, output.fail, output.print_json, lambda value: output.echo(value, err=True)):
        with pytest.MonkeyPatch.context() as patch:
            streams = io.StringIO(), io.StringIO()
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            with contextlib.suppress(SystemExit):
                write(text)  # type: ignore[operator]
            written = streams[0].getvalue() + streams[1].getvalue()
            assert all(letter == "\n" or letter == "\t" or output.clean(letter) == letter for letter in written)
            if write is output.print_json:
                assert json.loads(written) == text, "nothing is lost"


def test_a_failure_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        output.fail("x" * 53_000_000)
    assert len(capsys.readouterr().err) < 11_000


def test_log_lines_are_plain_with_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    log = logging.Logger("test")
    log.addHandler(plain_handler(stream))
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("%s", HOSTILE)
    assert "Traceback" in stream.getvalue() and "red" in stream.getvalue() and is_plain(stream.getvalue())


def test_everything_that_a_flow_logs_is_plain() -> None:
    """To Prefect's API and to the worker's log alike."""
    import prefect.logging.handlers  # noqa: F401
    from prefect.logging.configuration import setup_logging

    setup_logging()
    shield_run_logs()
    shield_run_logs()
    record = logging.makeLogRecord({"msg": HOSTILE, "levelname": "INFO", "flow_run_name": "x", "task_run_name": "x"})
    handlers: list[Any] = [
        handler
        for name in ("prefect", "prefect.flow_runs", "prefect.task_runs")
        for handler in logging.getLogger(name).handlers
    ]
    assert handlers
    for handler in handlers:
        text = handler.format(record)
        assert is_plain(text.replace("\u200b", "")) and "red" in text
        assert not isinstance(handler.formatter.inner, PlainFormatter)
