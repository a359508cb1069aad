"""Output of every command: tables, JSON, errors. Rich never reads the text as markup."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Width of output to a file or a pipe, unless COLUMNS asks for more.
WIDTH = 160


def console(**options: Any) -> Console:
    """Standard output, which prints every `str` as it is. Tables keep their width in a file or a pipe."""
    from rich.console import Console

    given = os.environ.get("COLUMNS", "")
    width = None if sys.stdout.isatty() else max(int(given), WIDTH) if given.isdigit() else WIDTH
    return Console(width=width, markup=False, emoji=False, highlight=False, **options)


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
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def progress_log() -> logging.Logger:
    """Progress of the stages, on the error stream: the output holds the tables only."""
    log = logging.getLogger("smoltulu.progress")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    return log


def fail(error: object) -> NoReturn:
    """Print one clear message and exit with code 1."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        error = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
    elif isinstance(error, OSError) and error.filename:
        error = f"{error.strerror}: {error.filename}"
    typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
    raise SystemExit(1)


@contextlib.contextmanager
def failures(*others: type[Exception]) -> Iterator[None]:
    """End the command by `fail`, without traceback, on ValueError, OSError and `others`: the user has to fix these."""
    kinds: tuple[type[Exception], ...] = (ValueError, OSError, *others)
    try:
        yield
    except kinds as error:
        fail(error)
