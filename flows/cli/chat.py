"""`smoltulu chat`: talk to a model of the store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from smoltulu.flows.cli.output import echo, failures
from smoltulu.flows.cli.store import StoreOption, open_catalogue


def chat(
    what: Annotated[str, typer.Argument(help="RUN:STAGE (as tiny-…:sft), a tag, first digits of a key, or a folder")],
    say: Annotated[list[str] | None, typer.Option("--say", help="turns to say, one answer each; then end")] = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    template: Annotated[str | None, typer.Option(help="shipped chat template or file, for the model's own")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="0: greedy")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 512,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    store: StoreOption = None,
) -> None:
    """Talk to a model of the store, in its own chat template. An empty line or Ctrl-D ends it, /new begins anew."""
    with failures():
        folder = _folder(what, store)
        from smoltulu.tasks.models.conversation import Conversation

        talk = Conversation(
            folder, template=template, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
    if not say:
        echo(f"{folder}\nEmpty line: end. /new: begin anew.")
    for text in say or iter(_ask, None):
        if text == "/new":
            talk.forget()
            continue
        with failures():
            ended = talk.answer(text, _show)
        echo("" if ended else f" [cut after {max_new_tokens:,} tokens]")


def _ask() -> str | None:
    """What the user says; None to end."""
    try:
        return input("> ") or None
    except (EOFError, KeyboardInterrupt):
        return None


def _show(piece: str) -> None:
    # A model writes what it likes: no control character of a terminal but the line's end.
    sys.stdout.write("".join(c for c in piece if c.isprintable() or c in "\n\t"))
    sys.stdout.flush()


def _folder(what: str, store: Path | None) -> Path:
    """The model's folder. ValueError where something else is meant."""
    from pydantic import TypeAdapter

    from smoltulu.flows.cli.store_views import refs_of_run
    from smoltulu.schemas.common import ArtifactPath
    from smoltulu.schemas.run import RunRecord

    if Path(what).is_dir():
        return Path(what)
    catalogue = open_catalogue(store)
    name, colon, stage = what.rpartition(":")
    found = catalogue.resolve(name if colon else what)
    if isinstance(found, RunRecord):
        refs = refs_of_run(found)
        nodes = {node: ref for node, ref in refs.items() if "folder" in catalogue.known(ref).get("outputs", {})}
        node = stage.replace("_", "-")
        if not colon or node not in nodes:
            given = f"has no model of {stage!r}" if colon else "is a whole run"
            raise ValueError(f"{found.run_name} {given}; name one of its models: " + ", ".join(
                f"{found.run_name}:{one}" for one in nodes))  # fmt: skip
        found = nodes[node]
    newest = catalogue.folder(found).newest
    if newest is None:
        raise ValueError(f"{found.stage}/{found.key[:12]} is not finished; run it first")
    inside = catalogue.manifest(found, newest)["outputs"].get("folder")
    if inside is not None:
        folder = catalogue.path(found) / newest / TypeAdapter(ArtifactPath).validate_python(inside)
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{what} ({found.stage}) is no model; name a model's artifact, e.g. of sft, dpo or rlvr")
