"""Output of every command: lines, tables, JSON, errors.

What is printed comes from rows, recipes, stores and servers. Rich never reads it as markup, and no character of it
reaches the terminal as a command.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Container, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from smoltulu.artifacts.readable import clean, json_text
from smoltulu.flows.logs import plain_handler

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Width of output to a file or a pipe, unless COLUMNS asks for more.
WIDTH = 160
#: Characters of a failure: what is longer is no message.
_MAX_FAILURE = 10_000


def console(**options: Any) -> Console:
    """Standard output, which prints every `str` as text. Tables keep their width in a file or a pipe."""
    given = os.environ.get("COLUMNS", "")
    width = None if sys.stdout.isatty() else max(int(given), WIDTH) if given.isdigit() else WIDTH
    return _clean_console()(width=width, markup=False, emoji=False, highlight=False, **options)


@cache
def _clean_console() -> type[Console]:
    from rich.console import Console

    class CleanConsole(Console):
        """A console that shows control characters instead of obeying them; its own colours stay."""

        def render_str(self, text: str, **style: Any) -> Any:
            return super().render_str(clean(text), **style)  # before it is measured

        def render(self, *arguments: Any, **options: Any) -> Iterator[Any]:
            for segment in super().render(*arguments, **options):
                yield segment if segment.control else segment._replace(text=clean(segment.text))

    return CleanConsole


def echo(text: object, err: bool = False) -> None:
    """One line, or a few."""
    typer.echo(clean(text), err=err)


def table(*headings: str, title: str | None = None, right: Container[str] = (), whole: Container[str] = ()) -> Table:
    """A table without rows. Cells are plain `str`, or `Text` if they have a colour.

    right   headings of the columns that are aligned to the right
    whole   headings of the columns that are never wrapped
    """
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for name in headings:
        made.add_column(name, justify="right" if name in right else "left", no_wrap=name in whole)
    return made


def print_json(value: Any) -> None:
    """Print a value as JSON, for programs."""
    typer.echo(json_text(value, indent=1))


def progress_log() -> logging.Logger:
    """Progress of the stages, on the error stream: the output holds the tables only."""
    log = logging.getLogger("smoltulu.progress")
    if not log.handlers:
        log.addHandler(plain_handler(sys.stderr))
    log.setLevel(logging.INFO)
    log.propagate = False
    return log


def fail(error: object) -> NoReturn:
    """Print one clear message and exit with code 1."""
    from pydantic import ValidationError

    from smoltulu.schemas.common import problems_of

    if isinstance(error, ValidationError):
        error = "; ".join(problems_of(error))
    elif isinstance(error, OSError) and error.filename:
        error = f"{error.strerror}: {error.filename}"
    text = clean(error)
    if len(text) > _MAX_FAILURE:
        text = f"{text[:_MAX_FAILURE]}... ({len(text):,} characters)"
    typer.secho(f"error: {text}", fg=typer.colors.RED, err=True)
    raise SystemExit(1)


@contextlib.contextmanager
def failures(*others: type[Exception]) -> Iterator[None]:
    """End the command by `fail`, without traceback, on ValueError, OSError and `others`: the user has to fix these."""
    kinds: tuple[type[Exception], ...] = (ValueError, OSError, *others)
    try:
        yield
    except kinds as error:
        fail(error)
